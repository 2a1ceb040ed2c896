"""FedRPCA: what clients have in common is averaged, what is each one's own is scaled up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.statistics import Statistics

_STEPS, _NEAR = 2000, 1e-7


@dataclass(frozen=True)
class RobustPca(Assignment):
    """The clients' changes of a factor, as columns, are split into a low-rank and a sparse part,

        [vec(A₁ − A⁰) … vec(A_k − A⁰)] = L + S,    min ‖L‖_* + λ‖S‖₁,

    and A' = A⁰ + η·Σ wᵢ(Lᵢ + β·Sᵢ); B likewise. β = 1 is plain averaging. λ = 1/√(rows), as in the
    paper that robust PCA is from. The means are weighted by wᵢ, the paper's are not; β is a fixed
    number here, which the paper also adapts from round to round. What the pair misses is dropped.

    Attributes:
        boost: β, at least 0.

    Source:
        Jhunjhunwala et al., "FedRPCA", arXiv 2506.01194; Candès, Li, Ma, Wright, "Robust principal
        component analysis?", arXiv 0912.3599, algorithm 1.
    """

    name = "average, sparse part scaled"
    needs = frozenset({"ends"})

    boost: float = 2.0

    def assign(self, s: Statistics) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        if s.hollow:
            return Assigned(s.mean)
        moved = {}
        for x in "AB":
            began = getattr(s.start, x)
            drifts = [getattr(e.end, x) - getattr(e.start, x) for e in s.ends]
            columns = torch.stack([d.flatten() for d in drifts], dim=1)
            w = columns.new_tensor([e.weight for e in s.ends])
            # L + βS = all + (β − 1)S
            mean = (columns + (self.boost - 1) * sparse_part(columns)) @ w
            moved[x] = began + s.eta * mean.reshape(began.shape)
        return Assigned(replace(s.mean, **moved))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.boost < float("inf"):
            yield f"boost: expected a number of at least 0, got {self.boost}"


def sparse_part(m: Tensor) -> Tensor:
    """S of the robust PCA of m (rows × columns, few columns), by its augmented Lagrangian."""
    import torch  # noqa: PLC0415

    if not m.any():
        return torch.zeros_like(m)
    whole, rows = m.double(), max(m.shape)
    mu = whole.numel() / (4 * whole.abs().sum())
    s = y = torch.zeros_like(whole)
    for _ in range(_STEPS):
        # singular values of few columns: from the eigenvalues of their inner products
        x = whole - s + y / mu
        square, v = torch.linalg.eigh(x.mT @ x)
        kept = (1 - 1 / (mu * square.clamp_min(1e-300).sqrt())).clamp_min(0)
        low = x @ (v * kept) @ v.mT
        x, before = whole - low + y / mu, s
        s = x.sign() * (x.abs() - 1 / (rows**0.5 * mu)).clamp_min(0)
        left = whole - low - s
        y = y + mu * left
        if max(left.norm(), (s - before).norm()) <= _NEAR * whole.norm():
            break
    return s.to(m.dtype)
