"""Several clients in one model: each adapted layer and head holds all their parameters, stacked.

A batch is the clients' rows one client after the other, equally many of each; every linear map of
factors and heads multiplies each client's rows by that client's own matrix, in one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class Stack:
    """The parameters of `count` clients, in place of those of the given layers.

    A client's own parameters are views: its optimizer, which knows nothing of the others, changes
    its part of the stack. Gradients are views likewise.

    Attributes:
        active: How many clients the model computes at present, the first ones.
    """

    def __init__(self, layers: Sequence[nn.Linear], count: int) -> None:
        self.layers = layers
        self.active = count
        self._slots = [(m, n) for m in layers for n, _ in m.named_parameters(recurse=False)]
        self._single = [m.get_parameter(n) for m, n in self._slots]
        self._stacked = [_stacked(p, count) for p in self._single]
        self._own = [[_part(p, i) for p in self._stacked] for i in range(count)]

    def put(self, client: int) -> None:
        """Takes a client's parameters from the model, as they are now."""
        with torch.no_grad():
            for own, single in zip(self._own[client], self._single):
                own.copy_(single)

    def get(self, client: int) -> None:
        """Makes a client's parameters the model's."""
        with torch.no_grad():
            for own, single in zip(self._own[client], self._single):
                single.copy_(own)

    def trained(self, client: int) -> list[nn.Parameter]:
        """The parameters of a client that have gradients."""
        return [p for p in self._own[client] if p.requires_grad]

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place."""
        for parameter in self._stacked:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @contextmanager
    def one(self, client: int) -> Iterator[None]:
        """The model has this client's own parameters, e.g. to make an optimizer for them."""
        self._install(self._own[client])
        try:
            yield
        finally:
            self._install(self._single)

    @contextmanager
    def all(self) -> Iterator[None]:
        """The model computes batches of the first `active` clients."""
        self._install(self._stacked)
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
            self._install(self._single)

    def _install(self, parameters: Sequence[nn.Parameter]) -> None:
        for (module, name), parameter in zip(self._slots, parameters):
            setattr(module, name, parameter)

    def _forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x: (clients · rows) × … × in; each client's rows times its own matrix."""
        rows = x.reshape(self.active, -1, x.shape[-1])
        weight = layer.weight[: self.active].transpose(1, 2)
        if layer.bias is None:
            y = torch.bmm(rows, weight)
        else:
            y = torch.baddbmm(layer.bias[: self.active, None], rows, weight)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _stacked(parameter: nn.Parameter, count: int) -> nn.Parameter:
    stacked = nn.Parameter(
        parameter.detach().new_empty(count, *parameter.shape), parameter.requires_grad
    )
    if stacked.requires_grad:
        stacked.grad = torch.zeros_like(stacked)
    return stacked


def _part(stacked: nn.Parameter, client: int) -> nn.Parameter:
    part = nn.Parameter(stacked.detach()[client], stacked.requires_grad)
    if stacked.grad is not None:
        part.grad = stacked.grad[client]
    return part
