"""What is added to a client's gradients beside those of its rows' loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedex_lora.aggregation.pruning import Pruning
from fedex_lora.engines.turn import Turn


@contextmanager
def pulled(
    parameters: Mapping[str, nn.Parameter], turn: Turn, mu: float, last: Callable[[], bool]
) -> Iterator[dict[str, Tensor]]:
    """Adds c − cᵢ to the gradient of all that is trained, where there are variates (SCAFFOLD);
    μ·(x − x⁰), x⁰ being what it is now (FedProx); and the gradient of the penalty of a client
    whose rank may shrink.

    They are added as the gradient is made, so that they are clipped with it; of several backward
    passes to a step the last one adds them.

    Args:
        parameters: The model's, by flat name.
        last: Whether the backward pass is the last one before a step.

    Yields:
        Sums of the gradients as they were without all that, of what has variates.
    """
    sums: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []

    def pull(p: nn.Parameter, strength: float, gradient: Callable[[], Tensor]) -> None:
        hooks.append(p.register_hook(lambda g: g + strength * gradient() if last() else g))

    for name, c in turn.start.variates.items():
        p = parameters[name]
        sums[name] = torch.zeros_like(p, dtype=torch.float32)
        if p.requires_grad:
            hooks.append(p.register_hook(partial(_add, sums[name])))
            pull(p, 1.0, c.to(p).clone)
    for p in parameters.values() if mu else ():
        if p.requires_grad:
            pull(p, mu, partial(_away, p, p.detach().clone()))
    if (pruning := turn.pruning) is not None:
        for layer in turn.start.layers:
            pair = [parameters[f"{x}/{layer}"] for x in "AB"]
            for which, p in enumerate(pair):
                pull(p, pruning.penalty, partial(_growing, pruning, pair, which))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _add(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def _away(p: nn.Parameter, began: Tensor) -> Tensor:
    return p.detach() - began


def _growing(pruning: Pruning, pair: Sequence[nn.Parameter], which: int) -> Tensor:
    a, b = pair
    return pruning.gradients(a.detach(), b.detach())[which]
