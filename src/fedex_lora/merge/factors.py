"""The weighted mean of LoRA updates of one layer, W = Σ wᵢ·sᵢ·BᵢAᵢ, as factors.

W is the product of the concatenated factors L = [w₁s₁B₁, w₂s₂B₂, ...] (m × K) and
R = [A₁; A₂; ...] (K × n), K = Σ rᵢ, so the exact mean costs a copy. Its singular values follow
from two K × K Gram matrices in float64, without a QR of the tall factors:

    LᵀL = V Λ Vᵀ,  RRᵀ = Q Θ Qᵀ,  Λ^½ VᵀQ Θ^½ = U S Zᵀ   ⟹   W = (L V Λ^-½ U) S (Zᵀ Θ^-½ Qᵀ R)

A Gram matrix in float64 resolves singular values down to 1e-8 of the largest; float32 factors hold
no more than 6e-8. So nothing is lost that the factors had. Where K reaches min(m, n), W itself is
summed up in float64, and the Gram matrix of its shorter side takes the place of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta

Term = tuple[Tensor, Tensor, float]  # A (r × in), B (out × r), scale

EPS = torch.finfo(torch.float32).eps
# eigenvalues of a Gram matrix up to this part of the largest are rounding
_ROUNDING = 16 * torch.finfo(torch.float64).eps
_ROWS = 1024  # or columns; converted to float64 at a time, which fits in a cache


@dataclass(frozen=True)
class Sum:
    """W as it was summed up.

    Attributes:
        update: W as float32 factors, or (where they would be larger) dense in float64.
        size: √Σⱼ ‖lⱼ‖²‖rⱼ‖² over the columns lⱼ of the summands' left factors and the rows rⱼ of
            their right ones. Rounding these to float32 changes W by about ε·size, ε = 1.2e-7.
            None where `update` is made of the summands' own factors.
    """

    update: Delta
    size: float | None = None


@dataclass(frozen=True)
class Reduced:
    """A sum at the rank that was asked for.

    Attributes:
        factors: float32, left (out × rank), right (rank × in).
        missed: ‖W − factors‖_F, 0 where only rounding was cut off.
        norm: ‖W‖_F.
    """

    factors: Delta
    missed: float
    norm: float


def merge_factors(
    terms: Iterable[Term], weights: Sequence[float], rank: int | None = None
) -> Delta:
    """Σ wᵢ·sᵢ·BᵢAᵢ with wᵢ = weightsᵢ / Σ weights, at its numerical rank.

    Args:
        terms: (A, B, scale) of every adapter: A (rᵢ × in), B (out × rᵢ), any floating dtype.
        weights: One a term, at least 0, one above 0.
        rank: At most this rank: the best approximation in Frobenius norm (Eckart and Young).

    Returns:
        float32 factors, left (out × q), right (q × in). The numerical rank q is the smallest whose
        best approximation is as near to the sum as float32 factors can tell: see `reduce`.

    Example:
        >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
        >>> merged = merge_factors([(a, b, 2.0), (a, -b, 1.0)], [3, 1])
        >>> merged.rank, round(merged.dense()[0, 0].item(), 6)
        (1, 1.25)
    """
    terms, total = list(terms), sum(weights)
    shape = terms[0][1].shape[0], terms[0][0].shape[1]
    rank_of_all = sum(a.shape[0] for a, _, _ in terms)
    whole = weighted_sum(terms, [w / total for w in weights], shape, rank_of_all)
    return reduce(whole, rank).factors


def weighted_sum(
    terms: Iterable[Term], weights: Sequence[float], shape: tuple[int, int], rank: int
) -> Sum:
    """Σ wᵢ·sᵢ·BᵢAᵢ as concatenated float32 factors of rank Σ rᵢ; terms are taken one at a time.

    Once Σ rᵢ reaches min(out, in), that is W as a dense float64 matrix, so that memory does not
    grow with the number of terms.

    Args:
        shape: (out, in).
        rank: Σ rᵢ.
    """
    if rank >= min(shape):
        return _dense_sum(terms, weights, shape)
    left, right = torch.empty(shape[0], rank), torch.empty(rank, shape[1])
    start = 0
    for (a, b, scale), weight in zip(terms, weights, strict=True):
        end = start + a.shape[0]
        torch.mul(b.float(), weight * scale, out=left[:, start:end])
        right[start:end] = a
        start = end
    return Sum(Delta(left, right))


def _dense_sum(terms: Iterable[Term], weights: Sequence[float], shape: tuple[int, int]) -> Sum:
    total, square = torch.zeros(shape, dtype=torch.float64), 0.0
    for (a, b, scale), weight in zip(terms, weights, strict=True):
        left, right = b.double() * (weight * scale), a.double()
        total.addmm_(left, right)
        square += (left.square().sum(0) * right.square().sum(1)).sum().item()
    return Sum(Delta(total), square**0.5)


def reduce(total: Sum, rank: int | None = None, error: float = 0.0) -> Reduced:
    """The best approximation of W of the smallest rank that will do.

    Args:
        total: W.
        rank: The largest rank; none by default.
        error: How much of ‖W‖_F may be missed. What may be missed in any case is ε·size, what
            rounding the factors to float32 changes: singular values below that are noise.

    Returns:
        W's own factors, or itself and the identity, (in float32) where nothing is cut, else
        balanced ones: columns of left and rows of right have equal norms.
    """
    w = total.update
    if w.right is None:
        return _reduce_dense(w.left, EPS * (total.size or 0.0), rank, error)
    grams = _gram(w.left), _gram(w.right.mT)
    noise = EPS * (grams[0].diagonal() * grams[1].diagonal()).sum().sqrt().item()
    roots = _Roots.of(*grams)
    if not error and (rank is None or rank >= w.rank) and roots.smallest(w.rank) > noise:
        norm = (grams[0] * grams[1]).sum().sqrt().item()
        return Reduced(w.to(torch.float32), 0.0, norm)  # of full rank: no need of an SVD
    u, s, zh = torch.linalg.svd(roots.core(), full_matrices=False)
    keep, missed, norm = _cut(s, noise, rank, error)
    if keep == w.rank:
        return Reduced(w.to(torch.float32), 0.0, norm)
    half = s[:keep].sqrt()
    kept = roots.applied(w, u[:, :keep] * half, half[:, None] * zh[:keep])
    return Reduced(kept, missed, norm)


def singular_values(w: Delta) -> Tensor:
    """Of factors, descending, in float64; those up to 1e-8 of the largest may be missing."""
    left, right = w.factors()
    return torch.linalg.svdvals(_Roots.of(_gram(left), _gram(right.mT)).core())


def _reduce_dense(w: Tensor, noise: float, rank: int | None, error: float) -> Reduced:
    """`reduce` of a dense W by WWᵀ = Q Λ Qᵀ (or WᵀW, if that is smaller): W = (Q S)(S⁻¹ Qᵀ W)."""
    if w.shape[0] > w.shape[1]:
        turned = _reduce_dense(w.mT, noise, rank, error)
        left, right = (part.mT.contiguous() for part in reversed(turned.factors.factors()))
        return Reduced(Delta(left, right), turned.missed, turned.norm)
    q, s = (t.flip(-1) for t in _roots(w @ w.mT))
    keep, missed, norm = _cut(s, noise, rank, error)
    if keep == len(w):
        return Reduced(Delta(*Delta(w.float()).factors()), 0.0, norm)
    half = s[:keep].sqrt()
    left = (q[:, :keep] * half).float()
    right = ((q[:, :keep] / half).mT @ w).float()
    return Reduced(Delta(left, right), missed, norm)


def _cut(s: Tensor, noise: float, rank: int | None, error: float) -> tuple[int, float, float]:
    """How many singular values are kept, what that misses, and ‖W‖_F.

    Args:
        s: Descending.
        noise: What may be missed in any case; `rank`, `error`: see `reduce`.
    """
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what is missed at rank 0, 1, ...
    norm = tails[0].item() if len(s) else 0.0
    needed = int((tails > max(noise, error * norm)).sum())
    keep = needed if rank is None else min(rank, needed)
    missed = tails[keep].item() if keep < len(s) else 0.0
    return keep, missed if missed > noise else 0.0, norm


@dataclass(frozen=True)
class _Roots:
    """LᵀL = V Λ Vᵀ and RRᵀ = Q Θ Qᵀ without their kernels, L's columns scaled to unit vectors."""

    size: Tensor  # the columns' norms, which went to R's rows
    v: Tensor
    left: Tensor  # Λ^½, ascending
    q: Tensor
    right: Tensor  # Θ^½

    @classmethod
    def of(cls, gram_left: Tensor, gram_right: Tensor) -> _Roots:
        size = gram_left.diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        v, left = _roots(gram_left / size / size[:, None])
        q, right = _roots(gram_right * size * size[:, None])
        return cls(size, v, left, q, right)

    def smallest(self, rank: int) -> float:
        """A lower bound of W's rank-th singular value; 0 where L or R is of a lower rank."""
        full = len(self.left) == len(self.right) == rank
        return (self.left[0] * self.right[0]).item() if full and rank else 0.0

    def core(self) -> Tensor:
        """Λ^½ VᵀQ Θ^½, which has W's singular values."""
        return self.left[:, None] * (self.v.mT @ self.q) * self.right

    def applied(self, w: Delta, u: Tensor, zh: Tensor) -> Delta:
        """L V Λ^-½ u and zh Θ^-½ Qᵀ R, computed in float64, rounded to float32."""
        to_left = (self.v / self.left / self.size[:, None]) @ u
        to_right = (zh / self.right) @ self.q.mT * self.size
        left, right = w.factors()
        new_left = [(rows.double() @ to_left).float() for rows in left.split(_ROWS)]
        new_right = [(to_right @ columns.double()).float() for columns in right.split(_ROWS, 1)]
        return Delta(torch.cat(new_left), torch.cat(new_right, 1))


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _ROUNDING * values[-1:]
    return vectors[:, kept], values[kept].sqrt()


def _gram(w: Tensor) -> Tensor:
    """WᵀW in float64, a block of rows at a time: a float64 copy of all of W would be large."""
    total = w.new_zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for rows in w.split(_ROWS):
        wide = rows.double()
        total += wide.mT @ wide
    return total


def rounded(w: Delta, dtype: torch.dtype) -> tuple[Delta, float]:
    """The factors in another dtype, and ‖W − rounded‖_F.

    The difference L·R − L'·R' = (L − L')·R + L'·(R − R') is taken in this form, which does not
    cancel.
    """
    new = w.to(dtype)
    if dtype == torch.float32:
        return new, 0.0
    (left, right), (new_left, new_right) = w.factors(), new.to(torch.float32).factors()
    lost = Delta(torch.cat([left - new_left, new_left], 1), torch.cat([right, right - new_right]))
    return new, lost.norm().item()


def finite(w: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not w.is_floating_point():
        return True
    w = w.float() if w.itemsize < 2 else w  # torch promotes no float8
    # where the sum is finite every number is, and it takes a tenth of the time
    total = w.sum(dtype=torch.promote_types(w.dtype, torch.float32))
    return bool(total.isfinite()) or bool(w.isfinite().all())
