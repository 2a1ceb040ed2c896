"""Conversations as their files have them: `messages`, ShareGPT's `conversations`, Alpaca's columns.

Whatever the form, a conversation is a list of turns `{"role": ..., "content": ...}` with the roles
system, user and assistant, as chat templates take them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedex_lora.errors import DataError, shown
from fedex_lora.tasks.base import check_columns, with_columns
from fedex_lora.tasks.lazy import Dataset

Turn = dict[str, str]

LISTS = ("messages", "conversations")  # columns of lists of messages
ALPACA = ("instruction", "input", "output")
COLUMNS = (*LISTS, *ALPACA, "system")
ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
TOOLS = frozenset(
    [
        "tool",
        "function",
        "ipython",
        "observation",
        "function_call",
        "function_response",
        "tool_call",
        "tool_calls",
        "tool_response",
    ]
)


@dataclass(frozen=True)
class Conversation:
    """One row's turns, up to the assistant's last; how many turns of tools were skipped."""

    turns: list[Turn]
    tools: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(turn["role"] for turn in self.turns)


class Unusable(ValueError):
    """What is wrong with a row."""


def form_of(columns: Sequence[str], where: str) -> str:
    """The column of messages, or "instruction" for Alpaca's form.

    Raises:
        UserError: There are no such columns.
    """
    for name in LISTS:
        if name in columns:
            return name
    if {"instruction", "output"} <= set(columns):
        return "instruction"
    raise DataError(
        f"{where}: expected a column 'messages' or 'conversations', or columns 'instruction' and "
        f"'output'; there are: {', '.join(columns)}. Name the right ones with task.columns, e.g. "
        "columns: {messages: NAME}, or take kind: instruction."
    )


def blank(rows: Dataset, where: str) -> Dataset:
    """The rows with some answer at the end of each, in place of the assistant's that stands there.

    Raises:
        UserError: There are no such columns.
    """
    form = form_of([*rows.column_names, *ALPACA[2:]], where)
    check_columns(rows, (form,), where)
    if form not in LISTS:
        return with_columns(rows, {"output": ["-"] * len(rows)})
    return with_columns(rows, {form: [_to_be_answered(value) for value in rows[form]]})


def _to_be_answered(value: Any) -> str | None:
    """A list of messages that ends with an answer, as JSON; what is no such list as it is."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    if not isinstance(turns, list) or not turns:
        return value if value is None else json.dumps(value)
    asked = list(turns)
    while asked and _is_answer(asked[-1]):
        asked.pop()
    return json.dumps([*asked, {"role": "assistant", "content": "-"}] if asked else [])


def _is_answer(message: Any) -> bool:
    said = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    return isinstance(said, str) and ROLES.get(said) == "assistant"


def conversations(rows: Dataset) -> list[Conversation]:
    """The conversations of rows that were checked."""
    form = form_of(rows.column_names, "")
    return [conversation(row, form) for row in records(rows)]


def _own_form(row: Mapping[str, Any], form: str) -> str:
    """A row's own, where files of several forms were put together."""
    there = (name for name in (*LISTS, "instruction") if row.get(name) is not None)
    return form if row[form] is not None else next(there, form)


def records(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows, with what a conversation is made of."""
    names = [name for name in COLUMNS if name in rows.column_names]
    return (dict(zip(names, values)) for values in zip(*(rows[name] for name in names)))


def conversation(row: Mapping[str, Any], form: str) -> Conversation:
    """A row's conversation.

    Raises:
        Unusable: It is none.

    Example:
        >>> row = {"conversations": [{"from": "human", "value": "2 + 2?"},
        ...                          {"from": "gpt", "value": "4"}]}
        >>> conversation(row, "conversations").turns[1]
        {'role': 'assistant', 'content': '4'}
        >>> conversation({"instruction": "Add.", "input": "2, 2", "output": 4}, "instruction").turns
        [{'role': 'user', 'content': 'Add.\\n\\n2, 2'}, {'role': 'assistant', 'content': '4'}]
    """
    form = _own_form(row, form)
    found = _alpaca(row) if form == "instruction" else _messages(row[form], form)
    turns, tools = [turn for turn in found if turn], sum(turn is None for turn in found)
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": content_of(row["system"], "system")})
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=None)
    if last is None:
        raise Unusable("a conversation without an assistant: there is nothing to learn from it.")
    return Conversation(turns[: last + 1], tools)


def _alpaca(row: Mapping[str, Any]) -> list[Turn | None]:
    asked = content_of(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        asked = f"{asked}\n\n{content_of(row['input'], 'input')}"
    answered = content_of(row["output"], "output")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _messages(value: Any, column: str) -> list[Turn | None]:
    """The turns; None for one of a tool, and an empty one for an empty system prompt."""
    if isinstance(value, str):  # in CSV, and in some Parquet files
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable(f"{column} is {shown(value)}, which is no list of messages.") from None
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else f"{shown(value)}; expected a list of messages"
        raise Unusable(f"{column} is {found}.")
    return [_turn(i, message) for i, message in enumerate(value, start=1)]


def _turn(number: int, message: Any) -> Turn | None:
    if not isinstance(message, Mapping):
        raise Unusable(
            f"message {number} is {shown(message)}; expected an object with role and content."
        )
    said = message.get("role") if message.get("role") is not None else message.get("from")
    if said in TOOLS or message.get("tool_calls") or message.get("function_call"):
        return None
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        found = "no role" if said is None else f"the role {shown(said)}"
        raise Unusable(f"message {number} has {found}; expected system, user, assistant or tool.")
    content = message.get("content") if "role" in message else message.get("value")
    content = message.get("value") if content is None else content
    if role == "system" and content in (None, ""):
        return {}
    return {
        "role": role,
        "content": content_of(content, f"the content of message {number} ({role})"),
    }


def content_of(value: Any, what: str) -> str:
    """A text that is not empty: as it is, a number's, or the texts of a list of parts."""
    if isinstance(value, list):
        value = "".join(_part(part, what) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        found = "missing" if value is None else f"{shown(value)}, which is no text"
        raise Unusable(f"{what} is {found}.")
    if not value.strip():
        raise Unusable(f"{what} is empty.")
    return value


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise Unusable(f"{what} has a part of type {shown(kind)}; only texts can be learned from.")
