"""Tasks whose rows are scored, and told, by the logits that the model has for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedex_lora.tasks.base import Collate, by_length, evaluating
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase, Tensor, nn
from fedex_lora.tasks.outputs import Outputs

Collator = Callable[[PreTrainedTokenizerBase], Collate]
Logits = Sequence[Tensor]  # of each encoded row, float64 on the CPU


def evaluate_logits(
    collator: Collator,
    scores: Callable[[Logits, Dataset], dict[str, float]],
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """A task's `evaluate`: what `scores` makes of the logits and the encoded rows."""
    return scores(row_logits(collator, model, encoded, tokenizer, batch_size), encoded)


def tell_logits(
    collator: Collator,
    told: Callable[[Logits, Dataset], list[dict[str, Any]]],
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """A prediction's `tell`: what `told` makes of them."""
    return told(row_logits(collator, model, encoded, tokenizer, batch_size), encoded)


def row_logits(
    collator: Collator,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Logits:
    """The logits of each row; of sequences they go on over what pads its batch."""
    collate, found = collator(tokenizer), dict[int, Tensor]()
    with evaluating(model) as device:
        for indices, rows in by_length(encoded, batch_size):
            batch = {k: v.to(device) for k, v in collate(rows).items() if k != "labels"}
            found |= zip(indices, model(**batch).logits.double().cpu())
    return [found[i] for i in range(len(encoded))]
