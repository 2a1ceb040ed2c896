"""A conversation as a model sees it: the chat template's text, and where the assistant speaks.

A template may write a turn otherwise once others follow: it drops earlier thoughts, or puts the
system prompt into the last question. So that the mask is right all the same, an answer is looked
for between renderings of the conversation up to it, and counts only where the text of the whole
conversation agrees with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedex_lora.errors import DataError, RecipeError, shown
from fedex_lora.tasks.base import place
from fedex_lora.tasks.conversations import Conversation, Turn
from fedex_lora.tasks.lazy import PreTrainedTokenizerBase, jinja2

Span = tuple[int, int]  # of characters

_FAILS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_THOUGHT = "</think>"


@dataclass(frozen=True)
class Rendered:
    """The text, the spans of it that are learned, and how many answers are not among them."""

    text: str
    spans: list[Span]
    lost: int


class Renderer:
    """Conversations by one template.

    Args:
        template: Jinja; None for the tokenizer's own.

    Raises:
        UserError: There is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        name = shown(tokenizer.name_or_path)
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise RecipeError(
                f"task.template: missing; the tokenizer of {name} has no chat template. Name one, "
                "e.g. chatml, or a file with one"
            )
        if not tokenizer.is_fast:
            raise RecipeError(
                f"task.kind: chat needs to know where tokens begin, and the tokenizer of {name} "
                "does not tell; take a model with a tokenizer.json"
            )
        self._tokenizer: Any = tokenizer
        self._template = template
        self._lost = cache(self._first_lost)

    def __call__(self, conversation: Conversation, row: int = 0) -> Rendered:
        """The text and where the assistant speaks.

        Args:
            row: Whose it is; see `place`.

        Raises:
            UserError: The template refuses the conversation, or leaves turns of it out.
        """
        turns = conversation.turns
        try:
            self._check(conversation.roles, row)
            text = self._text(turns)
            found = [
                self._span(text, turns, i)
                for i, turn in enumerate(turns)
                if turn["role"] == "assistant"
            ]
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(f"task.template: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, *_FAILS) as error:
            if isinstance(error, RecipeError):
                raise
            begin = shown(turns[0]["content"])
            raise DataError(
                f"{place(row)}: the chat template refuses a conversation "
                f"({', '.join(conversation.roles)}) that begins {begin}: {error}. Mend it, or name "
                "another task.template."
            ) from error
        spans = [span for span in found if span is not None]
        return Rendered(text, spans, len(found) - len(spans))

    def prompt(self, conversation: Conversation, row: int = 0) -> str:
        """The text up to where the last answer begins.

        Raises:
            UserError: As of the whole.
        """
        self(conversation, row)
        return self._asked(conversation.turns, len(conversation.turns) - 1)

    def _text(self, turns: Sequence[Turn], ask: bool = False) -> str:
        if not turns:
            return ""
        return self._tokenizer.apply_chat_template(
            list(turns),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=ask,
        )

    def _asked(self, turns: Sequence[Turn], i: int) -> str:
        """The prompt for the answer `turns[i]`. No template is asked about no turns: of an answer
        that nothing precedes it is what stands before its content, and of blanks there those that
        prompts end with."""
        if i:
            return self._text(turns[:i], ask=True)
        mark = "turn-1-of-1."
        opening = self._text([{**turns[0], "content": mark}]).partition(mark)[0]
        words = opening.rstrip()
        asked = self._text([{"role": "user", "content": mark}], ask=True)
        return opening if asked.endswith(opening[len(words) :]) else words

    def _check(self, roles: tuple[str, ...], row: int) -> None:
        lost = self._lost(roles)
        if lost is not None:
            raise RecipeError(
                f"task.template: {place(row)}: the chat template leaves out turn {lost + 1}, the "
                f"{roles[lost]}'s, of a conversation of {', '.join(roles)}; name another one"
            )

    def _first_lost(self, roles: tuple[str, ...]) -> int | None:
        """The first turn that the template leaves out of a conversation of these roles."""
        marks = [f"turn-{i}-of-{len(roles)}." for i in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        text = self._text(turns)
        return next((i for i, mark in enumerate(marks) if mark not in text), None)

    def _span(self, text: str, turns: Sequence[Turn], i: int) -> Span | None:
        """Where the answer `turns[i]`, and what ends it, stands in the whole text.

        It begins where the prompt for it ends; what of the prompt the whole text lacks (an opened
        thought) is part of the answer there. None where the texts disagree.
        """
        before, asked = self._text(turns[:i]), self._asked(turns, i)
        if not text.startswith(before):
            return None
        prompt = asked[len(before) :] if asked.startswith(before) else ""
        start = len(before) + _shared(prompt, text[len(before) :])
        until = self._text(turns[: i + 1])
        if text.startswith(until):
            return (start, len(until)) if start < len(until) else None
        return _by_content(text, start, until, turns[i]["content"].strip())


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    pairs = zip(a, b)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _by_content(text: str, start: int, until: str, answer: str) -> Span | None:
    """The answer and what ends it, where only what stands before it was written otherwise."""
    for words in (answer, answer.rpartition(_THOUGHT)[2].strip()):
        if not words or words not in until:
            continue
        whole = until[until.rindex(words) :]
        at = text.find(words, start)
        if at >= 0 and not text[start:at].strip() and text.startswith(whole, at):
            return start, at + len(whole)
    return None


def learned(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[bool], bool]:
    """Which tokens belong to a span, and whether one runs into a span from before it.

    Such a token is learned: it has the first characters of the answer.

    Example:
        >>> learned([(0, 2), (2, 5), (5, 6)], [(2, 5)])
        ([False, True, False], False)
        >>> learned([(0, 3), (3, 5)], [(2, 5)])
        ([True, True], True)
    """
    kept, runs = [False] * len(offsets), False
    at = 0
    for start, end in spans:
        while at < len(offsets) and offsets[at][1] <= start:
            at += 1
        runs |= at < len(offsets) and offsets[at][0] < start
        while at < len(offsets) and offsets[at][0] < end:
            kept[at] = True
            at += 1
    return kept, runs
