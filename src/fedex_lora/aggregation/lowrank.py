"""Factored matrices: W = left · right, never formed unless asked for.

Shapes: `left` is (..., m, r), `right` is (..., r, n); leading dimensions are a batch of
matrices of equal shape. Any floating dtype; float32 and float64 are what the rest uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fedex_lora.errors import UserError


@dataclass(frozen=True)
class LowRank:
    """The matrix left · right, of rank at most r.

    Example:
        >>> a = LowRank(torch.ones(3, 1), torch.ones(1, 2))
        >>> round(a.norm().item(), 4)
        2.4495
        >>> (a + a.scaled(-1.0)).compress().rank
        0
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.shape[-1] != self.right.shape[-2]:
            raise UserError(
                f"factors do not fit: {tuple(self.left.shape)} and {tuple(self.right.shape)}; "
                "the last size of left must be the last but one of right"
            )

    @property
    def rank(self) -> int:
        """The number of columns of `left`: an upper bound of the rank."""
        return self.left.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape (..., m, n) of the matrix that the factors stand for."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    def dense(self) -> Tensor:
        """The matrix itself, (..., m, n)."""
        return self.left @ self.right

    def scaled(self, c: float) -> LowRank:
        """c · W."""
        return self if c == 1 else LowRank(self.left * c, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        return concat([self, other])

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same factors in another dtype."""
        return LowRank(self.left.to(dtype), self.right.to(dtype))

    def orthonormal(self) -> LowRank:
        """Orthonormal basis of the columns times coefficients: the paper's Gram-Schmidt (sec. 3).

        Returns:
            The same matrix with leftᵀ·left = 1 and rank at most min(m, r).
        """
        q, r = thin_qr(self.left)
        return LowRank(q, r @ self.right)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, Vᵀ of W by QR of both factors and an SVD of the small core.

        Costs O((m + n) r² + r³) instead of O(m·n·min(m, n)).

        Returns:
            U (..., m, q), S (..., q) descending, Vᵀ (..., q, n) with q = min(m, n, r).
        """
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.mT)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        return q_left @ u, s, vh @ q_right.mT

    def singular_values(self) -> Tensor:
        """The min(m, n, r) largest singular values, descending; the others are zero."""
        r_left = torch.linalg.qr(self.left, mode="r").R
        r_right = torch.linalg.qr(self.right.mT, mode="r").R
        return torch.linalg.svdvals(r_left @ r_right.mT)

    def compress(self, rtol: float | None = None) -> LowRank:
        """The same matrix at its numerical rank, with orthonormal `left`.

        Args:
            rtol: Singular values up to rtol·σ₁ count as zero; ε·max(m, n) by default. QR alone
                does not reveal the rank, so the core's singular values decide.

        Returns:
            Factors of the numerical rank (of a batch: of the largest in it).
        """
        u, s, vh = self.svd()
        m, n = self.shape[-2:]
        rtol = torch.finfo(s.dtype).eps * max(m, n) if rtol is None else rtol
        # a sum that cancels leaves noise; what counts as noise is relative to the terms
        size = _norm(self.left) * _norm(self.right)
        floor = torch.finfo(s.dtype).eps * size
        limit = torch.maximum(rtol * s[..., :1].sum(-1), floor)
        rank = int((s > limit.unsqueeze(-1)).sum(-1).max()) if s.numel() else 0
        return _take(u, s, vh, rank)

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of rank at most `rank` in Frobenius norm (eq. 17-18)."""
        return _take(*self.svd(), rank)

    def split(self, rank: int) -> tuple[LowRank, LowRank]:
        """`truncate(rank)` and what it leaves out, from one SVD."""
        u, s, vh = self.svd()
        tail = LowRank(u[..., rank:] * s[..., None, rank:], vh[..., rank:, :])
        return _take(u, s, vh, rank), tail

    def norm(self) -> Tensor:
        """‖W‖_F, shape (...)."""
        return partial_norms(self)[0]

    def distance(self, other: LowRank) -> Tensor:
        """‖W − other‖_F, by QR of the concatenated factors."""
        return (self + other.scaled(-1.0)).norm()


def concat(terms: Iterable[LowRank]) -> LowRank:
    """The sum of the terms as one factored matrix; ranks add up."""
    terms = list(terms)
    return LowRank(
        torch.cat([t.left for t in terms], dim=-1), torch.cat([t.right for t in terms], dim=-2)
    )


def partial_norms(*terms: LowRank) -> list[Tensor]:
    """‖t₁‖_F, ‖t₁ + t₂‖_F, ..., each of shape (...), without concatenating the terms.

    ‖LR‖² = Σ (LᵀL)∘(RRᵀ) by Gram matrices. Inner products lose the digits that cancel in a sum: so
    they are taken in float32 only where hardly anything does, in float64 up to a point, and beyond
    that QR of the factors takes their place.

    Example:
        >>> one = LowRank(torch.ones(4, 1), torch.ones(1, 4))
        >>> [n.item() for n in partial_norms(one, one)]
        [4.0, 8.0]
    """
    if terms[0].left.dtype == torch.float32:
        for dtype, least in _CANCELS.items():
            norms, sizes = _gram_norms(terms, dtype)
            if bool((norms >= least * sizes).all()):
                return list(norms.float().unbind(-1))
    sums = (concat(terms[: i + 1]) for i in range(len(terms)))
    return [_norm(torch.linalg.qr(w.left, mode="r").R @ w.right) for w in sums]


# a norm below this part of √Σ‖lⱼ‖²‖rⱼ‖² is not left to inner products in that dtype
_CANCELS = {torch.float32: 0.3, torch.float64: 1e-4}


def _gram_norms(terms: Sequence[LowRank], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norms of the partial sums (..., len(terms)), and √Σ‖lⱼ‖²‖rⱼ‖² over columns and rows."""
    lefts, rights = [t.left for t in terms], [t.right.mT for t in terms]
    both = _gram(lefts, dtype) * _gram(rights, dtype)
    ends = list(accumulate(t.rank for t in terms))
    squares = torch.stack([both[..., :end, :end].sum((-2, -1)) for end in ends], dim=-1)
    diagonal = both.diagonal(dim1=-2, dim2=-1)
    sizes = torch.stack([diagonal[..., :end].sum(-1) for end in ends], dim=-1)
    return squares.clamp_min(0).sqrt(), sizes.sqrt()


def _gram(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """WᵀW of W = [parts], products in `dtype`, the result in float64."""
    parts = [part.to(dtype) for part in parts]
    rows = [torch.cat([x.mT @ y for y in parts], dim=-1) for x in parts]
    return torch.cat(rows, dim=-2).double()


def thin_qr(w: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., m, q) with orthonormal columns and R (..., q, r), QR = w, q = min(m, r).

    In float32 by CholeskyQR2 (Fukaya et al., arXiv 1809.11085): matrix products in place of
    Householder's reflections. One pass with a Gram matrix in float32 if that turns out to do, else
    two, else two in float64. Where w is too near a lower rank even for that, by torch.linalg.qr.
    """
    if w.dtype == torch.float32 and w.shape[-2] >= w.shape[-1] and w.numel():
        for dtype in (torch.float32, torch.float64):
            found = _cholesky_qr2(w, dtype)
            if found is not None:
                return found
    return torch.linalg.qr(w)


def _cholesky_qr2(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Q and R of w by Gram matrices in `dtype`; None if w is too ill-conditioned for that."""
    first = _cholesky(_gram([w], dtype))
    if first is None:
        return None
    q = _divided(w, first)
    gram = _gram([q], dtype)
    off = (gram - torch.eye(w.shape[-1], dtype=gram.dtype, device=w.device)).abs().max()
    if off < 1e-6:  # Householder's are no nearer
        return q, first.to(w.dtype)
    second = _cholesky(gram) if off < 0.1 else None  # near enough for a second pass to mend it
    return None if second is None else (_divided(q, second), (second @ first).to(w.dtype))


def _cholesky(gram: Tensor) -> Tensor | None:
    """R with RᵀR = gram; None if gram is not positive definite."""
    r, failed = torch.linalg.cholesky_ex(gram, upper=True)
    return None if bool(failed.any()) else r


def _divided(w: Tensor, r: Tensor) -> Tensor:
    """W·R⁻¹, backward stable.

    A product with the inverse is many times faster than a triangular solve. It changes W by up to
    ε·|W|·|R⁻¹|·|R|, so it is taken where that is hardly more than rounding W itself.
    """
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(r, eye, upper=True)
    if bool(((inverse.abs() @ r.abs()).sum(-1) < 16).all()):
        return w @ inverse.to(w.dtype)
    rows = torch.linalg.solve_triangular(r.mT.to(w.dtype), w.mT.contiguous(), upper=False)
    return rows.mT.contiguous()


def from_dense(w: Tensor) -> LowRank:
    """A dense (..., m, n) matrix as factors of rank min(m, n), one of which is the identity."""
    m, n = w.shape[-2:]
    eye = torch.eye(min(m, n), dtype=w.dtype, device=w.device).expand(*w.shape[:-2], -1, -1)
    return LowRank(w, eye) if n <= m else LowRank(eye, w)


def factored(w: LowRank | Tensor) -> LowRank:
    """`w` as factors, whichever form it has."""
    return w if isinstance(w, LowRank) else from_dense(w)


def dense(w: LowRank | Tensor) -> Tensor:
    """`w` as a dense matrix, whichever form it has."""
    return w.dense() if isinstance(w, LowRank) else w


def smaller(w: LowRank) -> LowRank | Tensor:
    """Whichever holds fewer numbers: the factors, r·(m + n), or the dense matrix, m·n."""
    m, n = w.shape[-2:]
    return w.dense() if w.rank * (m + n) >= m * n else w


def _norm(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=(-2, -1))


def _take(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> LowRank:
    return LowRank(u[..., :rank], s[..., :rank, None] * vh[..., :rank, :])
