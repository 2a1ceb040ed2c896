"""Fed-SB: an r × r matrix is trained between factors that one averaged gradient gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from fedex_lora.aggregation.adapter import Factors, LayerShape
    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class Inner(Assignment):
    """ΔW = s·B·R·A with B and A fixed after round 1, and R (r × r) trained and averaged:

        round 1:   D = −η·sgn(Σ wᵢGᵢ) ≈ U·S·Vᵀ, cut to rank r;   B = U, A = Vᵀ, R = S/s
        later on:  R' = Σ wᵢRᵢ, and Σ wᵢ·s·B·Rᵢ·A = s·B·R'·A: exact, r² numbers whatever k

    Gᵢ is the gradient of a layer's whole weight over the first batches of client i, and D the first
    step that Adam would take with it: the model after round 1 is what is kept of that step.

    The paper's text has the sign in D and R = S/s, and so has its code. There the gradient is of
    one process on rows of all clients; here each client sends its own, out × in numbers a layer,
    once, which the server sees. In the code η is the learning rate of the first step of its
    warm-up; here it is an option.

    Attributes:
        step: η, above 0.

    Source:
        Singhal et al., "Fed-SB", arXiv 2502.15436; LoRA-SB, arXiv 2411.19557.
    """

    name = "B and A from a gradient, R averaged"
    gradients = True

    step: float = 1e-4

    def first(self, layer: LayerShape, factors: Factors, seed: int) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        return Assigned(factors, inner=torch.zeros(layer.rank, layer.rank))

    def assign(self, s: Statistics) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        if s.gradient is None:
            return Assigned(s.start)
        pad, rank, dtype = torch.nn.functional.pad, s.layer.rank, s.gradient.dtype
        step = -self.step * s.gradient.sign().double()
        u, values, vh = (x.to(dtype) for x in torch.linalg.svd(step, full_matrices=False))
        missing = max(0, rank - len(values))
        b = pad(u[:, :rank], (0, missing)).contiguous()
        a = pad(vh[:rank], (0, 0, 0, missing)).contiguous()
        r = pad(values[:rank], (0, missing)).diag() / s.layer.scale
        return Assigned(replace(s.start, A=a, B=b, scale=s.layer.scale), inner=r)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.step < float("inf"):
            yield f"step: expected a number above 0, got {self.step}"
