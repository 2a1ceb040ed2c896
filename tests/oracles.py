"""Dense float64 formulas, straight from the papers, and random federations to try them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape

SITES = {
    "q": LayerShape(out=7, inp=5, rank=3, scale=1.7),
    "v": LayerShape(out=6, inp=9, rank=2, scale=0.6),
    "q2": LayerShape(out=7, inp=5, rank=3, scale=1.7),  # layers of equal shape
}


def product(f: Factors) -> Tensor:
    """s·B·A in float64."""
    return f.scale * f.B.double() @ f.A.double()


def mean(values: Sequence[Tensor], n: Sequence[float]) -> Tensor:
    """Σ nᵢxᵢ / Σ nᵢ in float64."""
    return sum(w * x.double() for w, x in zip(n, values)) / sum(n)  # type: ignore[return-value]


def ideal_change(
    starts: Sequence[Factors], ends: Sequence[Factors], n: Sequence[float], eta: float = 1.0
) -> Tensor:
    """η·Σ wᵢ·sᵢ·(BᵢAᵢ − Bᵢ⁰Aᵢ⁰)."""
    return eta * mean([product(e) - product(s) for s, e in zip(starts, ends)], n)


def residual(ends: Sequence[Factors], n: Sequence[float]) -> Tensor:
    """s·(Σ wᵢBᵢAᵢ − B̄·Ā): eq. 14 of the paper with weights and scale."""
    b, a = mean([f.B for f in ends], n), mean([f.A for f in ends], n)
    return mean([product(f) for f in ends], n) - ends[0].scale * b @ a


def dense64(w: object) -> Tensor:
    """A Delta or a tensor, dense float64."""
    if isinstance(w, Tensor):
        return w.double()
    return w.left.double() if w.right is None else w.left.double() @ w.right.double()  # type: ignore


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def start_state(
    layers: Mapping[str, LayerShape], generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> AdapterState:
    """Random factors (B ≠ 0) and a head of two tensors."""
    factors = {
        name: Factors(
            torch.randn(s.rank, s.inp, generator=generator, dtype=dtype),
            torch.randn(s.out, s.rank, generator=generator, dtype=dtype),
            s.scale,
        )
        for name, s in layers.items()
    }
    head = {
        "w": torch.randn(3, 4, generator=generator, dtype=dtype),
        "b": torch.randn(4, generator=generator, dtype=dtype),
    }
    return AdapterState(factors, head)


def trained_by(
    start: AdapterState, trained: frozenset[str], generator: torch.Generator, spread: float = 1.0
) -> AdapterState:
    """A client's end: random drifts of the trained factors and of the head."""

    def drift(t: Tensor) -> Tensor:
        return t + spread * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    factors = {
        name: Factors(
            drift(f.A) if "A" in trained else f.A, drift(f.B) if "B" in trained else f.B, f.scale
        )
        for name, f in start.layers.items()
    }
    head = {n: drift(t) for n, t in start.head.items()}
    pair = {n: Factors(drift(f.A), drift(f.B), f.scale) for n, f in start.pair.items()}
    return replace(start, layers=factors, head=head, pair=pair)
