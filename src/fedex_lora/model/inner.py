"""A matrix between the factors of an adapted layer: ΔW = s·B·R·A, R trained alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedex_lora.aggregation.adapter import whole_inner


class InnerLinear(nn.Linear):
    """x ↦ B·R·x in the place of a layer's B.

    Attributes:
        weight: B (out × r), that of the layer it takes the place of.
        inner: R (r × r); or heads × p × p, the blocks Hₕ of R = diag(s₁H₁, s₂H₂, …).
        scales: sₕ, one for each block, where there are such.

    Example:
        >>> b = nn.Linear(2, 3, bias=False)
        >>> both = with_inner(b, 2 * torch.eye(2))
        >>> bool(torch.allclose(both(torch.ones(2)), 2 * b(torch.ones(2))))
        True
        >>> heads = with_inner(b, torch.tensor([[[2.0]], [[2.0]]]))
        >>> bool(torch.allclose(heads(torch.ones(2)), 2 * b(torch.ones(2)))), heads.scales.tolist()
        (True, [1.0, 1.0])
    """

    def __init__(self, plain: nn.Linear, inner: Tensor) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.inner = nn.Parameter(plain.weight.new_zeros(inner.shape))
        heads = plain.weight.new_zeros(len(inner))
        self.scales: nn.Parameter | None = nn.Parameter(heads) if inner.ndim == 3 else None

    def value(self) -> Tensor:
        """R as it is sent: itself, or the blocks sₕHₕ."""
        return self.inner if self.scales is None else self.scales[:, None, None] * self.inner

    def write(self, value: Tensor) -> None:
        """Makes `value` what it is; the scales are 1 again."""
        with torch.no_grad():
            self.inner.copy_(value)
            if self.scales is not None:
                self.scales.fill_(1.0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.linear(input, whole_inner(self.value(), self.in_features)))


def with_inner(linear: nn.Linear, inner: Tensor | None) -> nn.Linear:
    """The linear map with `inner` as its R, or without one; itself where it is so already."""
    if inner is None:
        if not isinstance(linear, InnerLinear):
            return linear
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        plain.weight = linear.weight
        return plain
    if not isinstance(linear, InnerLinear) or linear.inner.shape != inner.shape:
        linear = InnerLinear(linear, inner)
    linear.write(inner)
    return linear
