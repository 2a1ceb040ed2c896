"""An r × r matrix between the factors of an adapted layer: ΔW = s·B·R·A, R trained alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InnerLinear(nn.Linear):
    """x ↦ B·R·x in the place of a layer's B.

    Attributes:
        weight: B (out × r), that of the layer it takes the place of.
        inner: R (r × r).

    Example:
        >>> b = nn.Linear(2, 3, bias=False)
        >>> both = InnerLinear(b)
        >>> _ = both.inner.data.copy_(2 * torch.eye(2))
        >>> bool(torch.allclose(both(torch.ones(2)), 2 * b(torch.ones(2))))
        True
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        rank = plain.in_features
        self.inner = nn.Parameter(plain.weight.new_zeros(rank, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.linear(input, self.inner))

    def plain(self) -> nn.Linear:
        """B alone again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        return linear


def with_inner(linear: nn.Linear, inner: Tensor | None) -> nn.Linear:
    """The linear map with `inner` as its R, or without one; itself where it is so already."""
    if inner is None:
        return linear.plain() if isinstance(linear, InnerLinear) else linear
    linear = linear if isinstance(linear, InnerLinear) else InnerLinear(linear)
    with torch.no_grad():
        linear.inner.copy_(inner)
    return linear
