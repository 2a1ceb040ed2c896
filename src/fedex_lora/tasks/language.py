"""What tasks of causal language models share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fedex_lora.tasks.base import (
    IGNORED,
    Blank,
    Collate,
    Encode,
    NoneLeft,
    Prediction,
    Task,
    as_they_are,
    by_length,
    evaluating,
    unasked,
)
from fedex_lora.tasks.encoding import token_collator
from fedex_lora.tasks.generation import Decoding, generate
from fedex_lora.tasks.lazy import (
    Dataset,
    Late,
    PreTrainedTokenizerBase,
    Tensor,
    functional,
    nn,
)
from fedex_lora.tasks.metrics import LOSS, PERPLEXITY, Metric, mean_loss, perplexity
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.packing import check_packing, packed

if TYPE_CHECKING:
    from fedex_lora.tasks import labelled
else:
    labelled = Late("fedex_lora.tasks.labelled")  # which needs torch

NO_METRICS: Mapping[str, Metric] = {}
GREEDY = Decoding(max_new_tokens=64)

logger = logging.getLogger(__name__)


def language_task(
    name: str,
    columns: tuple[str, ...],
    metrics: Mapping[str, Metric] = NO_METRICS,
    packing: bool = False,
    decoding: Decoding = GREEDY,
    blank: Blank = as_they_are,
    encode_prompts: Encode | None = None,
    **functions: Any,
) -> Task:
    """A task of a causal language model.

    Args:
        metrics: Those beside `perplexity` and `loss`. The first of all is the primary one.
        packing: Whether training batches are packed.
        decoding: Of texts that are told for rows without answers.
        blank: Of the task's `Prediction`.
        encode_prompts: The same.
        functions: `check`, `encode`, `evaluate` and what else a task has.
    """
    metrics = {**metrics, "perplexity": PERPLEXITY, "loss": LOSS}
    tell = partial(_tell, decoding)
    return Task(
        name=name,
        auto_model="AutoModelForCausalLM",
        peft_task_type="CAUSAL_LM",
        columns=columns,
        evaluation_splits=("validation", "test"),
        primary=next(iter(metrics)),
        metrics=metrics,
        collator=_packing_collator if packing else token_collator,
        check_training=check_packing if packing else None,
        prediction=Prediction(tell=tell, blank=blank, encode=encode_prompts),
        **functions,
    )


def _tell(
    decoding: Decoding,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any] | None]:
    """What the model says after each row's prompt; a row without one is the prompt."""
    rows = [dict(row) for row in encoded]
    there = [i for i, row in enumerate(rows) if not unasked(row)]
    prompts = [prompt_of(rows[i]) or rows[i]["input_ids"] for i in there]
    decoding = decoding.of_at_most(max_new_tokens)
    texts = dict(zip(there, generate(model, tokenizer, prompts, decoding, batch_size)))
    return [{"prediction": texts[i]} if i in texts else None for i in range(len(rows))]


def as_dataset(encoded: list[dict[str, Any]], rows: int, reason: str) -> Dataset:
    """Encoded rows with their `attention_mask`; warns if of `rows` some were left out, and why.

    Raises:
        UserError: None is left.
    """
    dropped = rows - len(encoded)
    if not encoded:
        raise NoneLeft(f"none of the {rows} rows can be used: in each the {reason}.")
    if dropped:
        logger.warning("%d of %d rows left out: their %s", dropped, rows, reason)
    return Dataset.from_list([{**e, "attention_mask": [1] * len(e["input_ids"])} for e in encoded])


def _packing_collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    return packed


def evaluate_loss(
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """`loss`, the mean of −log p over all labels in nats, and `perplexity`, its exponential."""
    sums = row_losses(model, encoded, tokenizer, batch_size)
    loss = mean_loss(*zip(*sums.values()))
    return {"perplexity": perplexity(loss), "loss": loss}


def row_losses(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> dict[int, tuple[float, int]]:
    """By row: the sum of −log p over its labels in nats, and their number."""
    collate = token_collator(tokenizer)
    sums: dict[int, tuple[float, int]] = {}
    with evaluating(model) as device:
        for indices, rows in by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            labels = batch.pop("labels")
            head = labelled.head_of(model, batch["input_ids"])
            if head is None:
                found = nll(model(**batch).logits, labels)
            else:
                found = labelled.token_losses(head, batch, labels).by_row(len(rows))
            sums |= zip(indices, zip(*found))
    return sums


def nll(logits: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """Per row: the sum of −log p(token | tokens before it) over its labels, and their number.

    Row by row, as a float32 copy of all logits may not fit into memory beside them.
    """
    targets = labels[:, 1:]
    losses = [
        functional.cross_entropy(row.float(), target, reduction="sum", ignore_index=IGNORED).item()
        for row, target in zip(logits[:, :-1], targets)
    ]
    return losses, (targets != IGNORED).sum(dim=1).tolist()


def prompt_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens of an encoded row that come before its labels."""
    return [i for i, label in zip(row["input_ids"], row["labels"]) if label == IGNORED]
