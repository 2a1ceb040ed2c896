"""The loss of each example by itself.

A loss averaged over all tokens of a batch, as transformers computes it, makes one example's
gradient depend on how long the others are. So the loss of an example is averaged within it, and a
batch's is their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from fedex_lora.tasks.base import IGNORED, Batch

Losses = Callable[[Any, Batch], Tensor]
"""(module, batch) → the loss of each of its rows, one of one's own."""


def example_losses(
    logits: Tensor, labels: Tensor, regression: bool = False, smoothing: float = 0.0
) -> Tensor:
    """The loss of each example, averaged over what is predicted in it, in float32.

    Args:
        logits: Rows × classes; rows × tokens × vocabulary of a causal model; rows × 1.
        labels: A number for each row; of a causal model one for each token.
        regression: Whether the loss is the squared error, not −log p.
        smoothing: ε of label smoothing, as torch's cross_entropy has it.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4)  # −log ¼ at each token that counts
        >>> example_losses(logits, torch.tensor([[0, 1, 2], [0, 1, IGNORED]])).tolist()
        [1.3862943649291992, 1.3862943649291992]
    """
    logits = logits.float()
    if regression:
        return (logits.squeeze(-1) - labels).square()
    if labels.dim() == 2:  # a token's logits are for the one after it
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = functional.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=smoothing,
    ).reshape(labels.shape)
    if labels.dim() == 1:
        return each
    return each.sum(1) / labels.ne(IGNORED).sum(1).clamp(min=1)


def logits_losses(
    module: Any, batch: Batch, regression: bool = False, smoothing: float = 0.0
) -> Tensor:
    """`example_losses` of a batch and its `labels` by the module's logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return example_losses(module(**inputs).logits, batch["labels"], regression, smoothing)
