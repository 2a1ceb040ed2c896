"""What tasks share that put a prompt to a causal language model and score what it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedex_lora.tasks.base import NoneLeft, unasked
from fedex_lora.tasks.encoding import encode_pairs, labelled
from fedex_lora.tasks.generation import Decoding, check_positions, generate, verdicts
from fedex_lora.tasks.language import as_dataset, evaluate_loss, prompt_of
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, nn
from fedex_lora.tasks.outputs import Outputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What became of one answer; `extracted` is None where the output holds none."""

    reference: str
    extracted: str | None
    correct: bool


Judge = Callable[[Dataset, Sequence[str]], list[Verdict]]  # (encoded rows, outputs)


def training_rows(
    prompts: list[str], responses: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Prompts and responses, encoded; the loss is over the response and the end-of-text token.

    Rows longer than `max_length` are left out, with a warning: a response whose end is cut off
    teaches to stop in the middle.

    Raises:
        UserError: No row is left.
    """
    pairs = encode_pairs(prompts, responses, tokenizer, max_length)
    fitting = [labelled(p, r, max_length) for p, r in pairs if len(p) + len(r) <= max_length]
    reason = f"prompt and response together are longer than max_length ({max_length} tokens)"
    return as_dataset(fitting, len(pairs), reason)


def evaluation_rows(
    prompts: list[str],
    responses: list[str],
    more: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    """Prompts and responses, encoded, every row with the columns that `more` has for it.

    No row is left out, so that scores are shares of all rows. The loss is over what of the
    response lies within `max_length`. A prompt that leaves no room there for a response has no
    labels and is not asked: it counts as answered wrongly, with a warning.

    Raises:
        UserError: No prompt leaves room.
    """
    pairs = encode_pairs(prompts, responses, tokenizer, max_length)
    rows = [labelled(p[:max_length], r, max_length) | dict(m) for (p, r), m in zip(pairs, more)]
    long = sum(not asked(row) for row in rows)
    reason = f"prompt alone fills max_length ({max_length} tokens)"
    if long == len(rows):
        raise NoneLeft(
            f"none of the {len(rows)} rows can be evaluated: in each the {reason}. Raise "
            "task.max_length, or task.evaluation_max_length."
        )
    if long:
        _log.warning("%d of %d rows count as wrong: their %s", long, len(rows), reason)
    return as_dataset(rows, len(rows), "")


def asked(row: Mapping[str, Any]) -> bool:
    """Whether an encoded row has room for a response."""
    return not unasked(row)


def check_room(max_new_tokens: int, model: nn.Module, parts: Sequence[Dataset]) -> None:
    """Raise a `UserError` if there is no room for answers after the prompts of encoded rows."""
    rows = [dict(row) for part in parts for row in part]
    check_positions(model, [prompt_of(row) for row in rows if asked(row)], max_new_tokens)


def evaluate_generated(
    judge: Judge,
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> tuple[dict[str, float], list[Verdict]]:
    """The scores (`accuracy`, `perplexity`, `loss`) of generated answers, and all verdicts.

    Args:
        judge: Says of every row's output whether it is right; "" is that of a row not asked.
        encoded: From `evaluation_rows`.
    """
    loss = evaluate_loss(model, encoded, tokenizer, batch_size)
    prompts, found = answered(decoding, model, encoded, tokenizer, batch_size, outputs)
    judged = judge(encoded, found)
    if outputs:
        outputs.verdicts(verdicts(tokenizer, prompts, found, [vars(v) for v in judged]))
    return {"accuracy": accuracy(judged), **loss}, judged


def answered(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Every row's prompt, and the text generated for it: "" for a row that is not asked."""
    prompts = [prompt_of(dict(row)) for row in encoded]
    there = [i for i, row in enumerate(encoded) if asked(dict(row))]
    texts = generate(model, tokenizer, [prompts[i] for i in there], decoding, batch_size, outputs)
    by_row = dict(zip(there, texts, strict=True))
    return prompts, [by_row.get(i, "") for i in range(len(prompts))]


def accuracy(judged: Sequence[Verdict]) -> float:
    """The share of right answers."""
    return sum(v.correct for v in judged) / len(judged)
