"""Means that a few clients cannot move as far as they like, and rotations before the mean.

Breakdown points: the median withstands fewer than half of the clients; the trimmed mean as many as
it cuts at either end, f of k > 2f; Krum f of k ≥ 2f + 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta


def trimmed(values: Sequence[Tensor], cut: int) -> Tensor:
    """The mean of every coordinate without its `cut` smallest and largest values.

    Source:
        Yin et al., "Byzantine-Robust Distributed Learning", arXiv 1803.01498.

    Example:
        >>> trimmed([torch.tensor([x]) for x in (1.0, 90.0, 2.0, 3.0, -70.0)], 1)
        tensor([2.])
    """
    ordered = torch.stack(list(values)).sort(dim=0).values
    return ordered[cut : len(values) - cut].mean(dim=0)


def middle(starts: Sequence[Factors], ends: Sequence[Factors], cut: int) -> tuple[Factors, Delta]:
    """A pair that moved by the trimmed means of the factors' changes, and what its product misses:

        B̃ = B⁰ + trim(Bᵢ − Bᵢ⁰), Ã likewise,    E = trim(sᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰)) − s·(B̃Ã − B⁰A⁰).

    So the increment of G that a method with a ledger makes of both is the trimmed mean of the
    clients' increments, of which no coordinate is beyond what an honest client sent.
    """
    first = starts[0]
    b = first.B + trimmed([e.B - s.B for s, e in zip(starts, ends)], cut)
    a = first.A + trimmed([e.A - s.A for s, e in zip(starts, ends)], cut)
    found = Factors(a, b, first.scale)
    changes = [e.delta().dense() - s.delta().dense() for s, e in zip(starts, ends)]
    missed = trimmed(changes, cut) - (found.delta().dense() - first.delta().dense())
    return found, Delta(missed)


def krum(ends: Sequence[AdapterState], liars: int) -> int:
    """The client with the least Σ of squared distances to its k − f − 2 nearest others.

    Distances are of the products sᵢBᵢAᵢ and the heads.

    Source:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        NeurIPS 2017, arXiv 1703.02757.
    """
    k = len(ends)
    square = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i):
            square[i, j] = square[j, i] = _square(ends[i], ends[j])
    nearest = square.sort(dim=1).values[:, 1 : max(2, k - liars - 1)]
    return int(nearest.sum(dim=1).argmin())


def _square(one: AdapterState, other: AdapterState) -> float:
    layers = ((f.delta() - other.layers[n].delta()).norm() for n, f in one.layers.items())
    head = ((t - other.head[n]).norm() for n, t in one.head.items())
    return sum(float(x) ** 2 for part in (layers, head) for x in part)


def aligned(start: AdapterState, end: AdapterState) -> AdapterState:
    """Every pair rotated towards the A that it began with; its product stays.

        R = argmin ‖RᵀA − A⁰‖_F over RᵀR = 1 = UVᵀ with UΣVᵀ = A·A⁰ᵀ,    (B, A) ← (BR, RᵀA)

    The reference is A, as in the published code; the paper takes A and B in turn, and may rotate a
    part of the way. Here it is all the way, and R may be a reflection.

    Source:
        Zhang et al., "FedRot-LoRA", arXiv 2602.23638.
    """
    return replace(end, layers={n: _rotated(start.layers[n], f) for n, f in end.layers.items()})


def _rotated(start: Factors, end: Factors) -> Factors:
    a, b = end.A.double(), end.B.double()
    u, _, vh = torch.linalg.svd(a @ start.A.double().mT)
    r = u @ vh
    return Factors((r.mT @ a).to(end.A.dtype), (b @ r).to(end.B.dtype), end.scale)
