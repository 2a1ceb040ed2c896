"""Each client's loss in a batch of several clients' rows: the one its Trainer would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from fedex_lora.tasks.base import IGNORED
from fedex_lora.tasks.labelled import Head, token_losses


def client_losses(
    logits: Tensor, labels: Tensor, real: Tensor, items: Sequence[float], regression: bool
) -> Tensor:
    """The mean over what each client is to predict, rows or tokens.

    Args:
        logits: Rows × classes; rows × tokens × vocabulary of a causal model; rows × 1.
        labels: A number for each row; of a causal model for each token.
        real: Which rows count.
        items: By what each client's sum is divided; equally many rows are of each.
        regression: Whether the loss is the squared error, not −log p.
    """
    if labels.dim() == 2:  # a token's logits are for the one after it
        logits, labels = logits[:, :-1], labels[:, 1:]
    if regression:
        each = (logits.squeeze(-1) - labels).square()
    else:
        each = functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
    rows = each.reshape(len(real), -1).sum(1) * real
    divisors = torch.tensor(items, dtype=rows.dtype, device=rows.device)
    return rows.reshape(len(items), -1).sum(1) / divisors


def labelled_losses(
    head: Head, inputs: Mapping[str, Tensor], labels: Tensor, real: Tensor, items: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """`client_losses` of a causal model at its labelled positions alone: their sum, which has
    gradients, and each client's, which has none."""
    divisors = torch.tensor(items, dtype=torch.float32, device=labels.device)
    each = len(labels) // len(items)
    weights = real / divisors.repeat_interleave(each)
    found = token_losses(head, inputs, labels, row_weights=weights)
    own = torch.zeros_like(divisors)
    return found.total, own.index_add_(0, found.rows // each, found.each * weights[found.rows])


def items(trainer: Trainer, labels: Tensor) -> float:
    """By what a client's loss is divided, as its Trainer counts it.

    For some models that is one more for each row than tokens are predicted.
    """
    one: Any = iter([{"labels": labels}])
    _, counted = trainer.get_batch_samples(one, 1, labels.device)
    if counted is None:
        counted = (labels[:, 1:] if labels.dim() == 2 else labels).ne(IGNORED).sum()
    return float(counted)
