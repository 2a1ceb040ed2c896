"""Conversations through a chat template; the loss is over the assistant's turns only, all of them.

Turns of tools, and those that call them, are skipped with a count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks.base import (
    IGNORED,
    LineOf,
    Task,
    check_columns,
    one_based,
    place,
    refuse_first,
)
from fedex_lora.tasks.chat_templates import template_of
from fedex_lora.tasks.conversations import (
    COLUMNS,
    Conversation,
    Unusable,
    blank,
    conversation,
    conversations,
    form_of,
    records,
)
from fedex_lora.tasks.encoding import shortened
from fedex_lora.tasks.language import as_dataset, evaluate_loss, language_task
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase
from fedex_lora.tasks.turns import Renderer, learned

_log = logging.getLogger(__name__)


class Chat(TaskSpec):
    template: str | None = None  # the tokenizer's own; a name, e.g. chatml; a file of Jinja
    packing: bool = False  # training batches without padding: rows in one sequence

    def renamable(self) -> Sequence[str]:
        return COLUMNS

    def build(self, labels: Sequence[str] | None) -> Task:
        template = None if self.template is None else template_of(self.template)
        return language_task(
            "chat",
            (),
            check=_check,
            encode=partial(_encode, template),
            evaluate=evaluate_loss,
            chat_template=template,
            packing=self.packing,
            blank=blank,
            encode_prompts=partial(_encode_prompts, template),
        )


register_task("chat", Chat)


def _check(rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    form = form_of(rows.column_names, where)
    check_columns(rows, (form,), where)
    refuse_first((_problem(row, form) for row in records(rows)), where, line_of)


def _problem(row: dict[str, Any], form: str) -> str | None:
    try:
        conversation(row, form)
    except Unusable as problem:
        return str(problem)
    return None


def _encode(
    template: str | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    found = conversations(rows)
    render = Renderer(tokenizer, template)
    rendered = [render(one, row) for row, one in enumerate(found)]
    encoding: Any = tokenizer(
        shortened([one.text for one in rendered], tokenizer, max_length),
        add_special_tokens=False,  # the template has written them
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
    )
    masks = [learned(o, r.spans) for o, r in zip(encoding["offset_mapping"], rendered)]
    encoded = [_row(ids, kept) for ids, (kept, _) in zip(encoding["input_ids"], masks) if any(kept)]
    _tell(found, [one.lost for one in rendered], sum(runs for _, runs in masks))
    reason = f"first answer lies beyond max_length ({max_length} tokens), or cannot be told apart"
    return as_dataset(encoded, len(rows), reason)


def _encode_prompts(
    template: str | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Up to where the assistant's last answer begins."""
    render = Renderer(tokenizer, template)
    texts = shortened(
        [render.prompt(c, row) for row, c in enumerate(conversations(rows))], tokenizer, max_length
    )
    found: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    fitting = [{"input_ids": ids, "labels": ids} for ids in found if len(ids) < max_length]
    reason = f"conversation alone fills max_length ({max_length} tokens)"
    return as_dataset(fitting, len(rows), reason)


def _row(ids: list[int], kept: list[bool]) -> dict[str, Any]:
    """Up to the last token that is learned: what follows it teaches nothing."""
    end = len(kept) - kept[::-1].index(True)
    labels = [i if k else IGNORED for i, k in zip(ids[:end], kept)]
    return {"input_ids": ids[:end], "labels": labels}


def _tell(found: Sequence[Conversation], lost: Sequence[int], runs: int) -> None:
    for line in _told(found, lost, runs):
        _log.warning("%s", line)


def _told(found: Sequence[Conversation], lost: Sequence[int], runs: int) -> Iterator[str]:
    with_tools = [one.tools for one in found if one.tools]
    if with_tools:
        yield (
            f"{sum(with_tools)} turns of tools skipped, in {len(with_tools)} of {len(found)} "
            "conversations"
        )
    if any(lost):
        yield (
            f"{sum(lost)} answers in {sum(map(bool, lost))} of {len(found)} conversations are not "
            "learned: the chat template writes what comes before them otherwise once more turns "
            f"follow, e.g. in {place(next(i for i, count in enumerate(lost) if count))}"
        )
    if runs:
        yield (
            f"in {runs} of {len(found)} conversations a token runs from the prompt into the "
            "answer, and is learned as part of it: the prompt alone is made of other tokens"
        )
