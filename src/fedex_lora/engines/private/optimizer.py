"""Clipping by example and noise, by Opacus, with noise from where it can be trusted."""

from __future__ import annotations

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedex_lora.federation.randomness import Bits, normal


class PrivateOptimizer(DPOptimizer):
    """An optimizer whose gradients are Σ clipped + σ·C·N(0, 1), over the expected batch size.

    Args:
        inner: Takes the step.
        noise: σ.
        bound: C.
        expected: L.
        bits: Where the noise is drawn from.
    """

    def __init__(
        self, inner: Optimizer, noise: float, bound: float, expected: int, bits: Bits
    ) -> None:
        super().__init__(
            inner, noise_multiplier=noise, max_grad_norm=bound, expected_batch_size=expected
        )
        self.bits = bits

    def accumulate(self) -> None:
        """Adds what a backward pass left, clipped row by row, to the sum."""
        self.signal_skip_step(True)
        self.step()
        self.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Noises the sum, which may be one of no rows at all, and takes the step."""
        for p in self.params:
            p.grad_sample = p.new_zeros((0, *p.shape))  # pyright: ignore
        self.signal_skip_step(False)
        self.step()
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """p.grad = sum + σ·C·N(0, 1)."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            total: torch.Tensor = p.summed_grad  # pyright: ignore
            p.grad = (total + deviation * normal(self.bits, total)).view_as(p)
