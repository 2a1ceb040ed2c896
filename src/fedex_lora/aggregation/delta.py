"""A change of one weight, as factors while those are smaller than the matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedex_lora.errors import UserError


@dataclass(frozen=True)
class Delta:
    """A matrix ΔW (out × in): left · right, or `left` itself where `right` is None.

    Shapes: `left` (out, r) and `right` (r, in), or `left` (out, in). Any floating dtype.

    Example:
        >>> a = Delta(torch.ones(3, 1), torch.ones(1, 2))
        >>> round(a.norm().item(), 4), a.shape, Delta(a.dense()).rank
        (2.4495, (3, 2), 2)
        >>> (a + a.scaled(-1.0)).compress().rank
        0
    """

    left: Tensor
    right: Tensor | None = None

    def __post_init__(self) -> None:
        if self.right is not None and self.left.shape[-1] != self.right.shape[-2]:
            raise UserError(
                f"factors do not fit: {tuple(self.left.shape)} and {tuple(self.right.shape)}; "
                "the last size of left must be the last but one of right"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], (self.left if self.right is None else self.right).shape[1])

    @property
    def rank(self) -> int:
        """An upper bound of the rank: the number of columns of `left`, or the shorter side."""
        return min(self.shape) if self.right is None else self.left.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors it consists of: `left` and `right`, or `dense`."""
        if self.right is None:
            return {"dense": self.left}
        return {"left": self.left, "right": self.right}

    @property
    def numbers(self) -> int:
        """How many numbers it holds: r·(out + in), or out·in."""
        return sum(t.numel() for t in self.parts.values())

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.left if self.right is None else self.left @ self.right

    def factors(self) -> tuple[Tensor, Tensor]:
        """`left` and `right`; of a dense matrix one of them is the identity."""
        if self.right is not None:
            return self.left, self.right
        out, inp = self.shape
        eye = torch.eye(min(out, inp), dtype=self.left.dtype, device=self.left.device)
        return (self.left, eye) if inp <= out else (eye, self.left)

    def smaller(self) -> Delta:
        """Whichever form holds fewer numbers."""
        out, inp = self.shape
        large = self.right is not None and self.rank * (out + inp) >= out * inp
        return Delta(self.dense()) if large else self

    def scaled(self, c: float) -> Delta:
        """c · ΔW."""
        return self if c == 1 else Delta(self.left * c, self.right)

    def to(self, dtype: torch.dtype) -> Delta:
        """The same in another dtype."""
        return Delta(self.left.to(dtype), None if self.right is None else self.right.to(dtype))

    def __add__(self, other: Delta) -> Delta:
        if self.right is None or other.right is None:
            return Delta(self.dense() + other.dense())
        return concat([self, other])

    def __sub__(self, other: Delta) -> Delta:
        return self + other.scaled(-1.0)

    def orthonormal(self) -> Delta:
        """Orthonormal basis of the columns times coefficients: the paper's Gram-Schmidt (sec. 3).

        Returns:
            The same matrix with leftᵀ·left = 1 and rank at most min(out, r).
        """
        left, right = self.factors()
        q, r = torch.linalg.qr(left)
        return Delta(q, r @ right)

    def wire_form(self) -> Delta:
        """As it is sent: orthonormal basis × coefficients, or dense where that is smaller."""
        form = self.smaller()
        return form if form.right is None else form.orthonormal()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, Vᵀ by QR of both factors and an SVD of the small core.

        Costs O((out + in)·r² + r³) instead of O(out·in·min(out, in)).

        Returns:
            U (out, q), S (q) descending, Vᵀ (q, in) with q = min(out, in, r).
        """
        left, right = self.factors()
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.mT)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        return q_left @ u, s, vh @ q_right.mT

    def singular_values(self) -> Tensor:
        """The min(out, in, r) largest singular values, descending; the others are zero."""
        left, right = self.factors()
        r_left = torch.linalg.qr(left, mode="r").R
        r_right = torch.linalg.qr(right.mT, mode="r").R
        return torch.linalg.svdvals(r_left @ r_right.mT)

    def compress(self, rtol: float | None = None) -> Delta:
        """The same matrix at its numerical rank, with orthonormal `left`.

        Args:
            rtol: Singular values up to rtol·σ₁ count as zero; ε·max(out, in) by default. QR alone
                does not reveal the rank, so the core's singular values decide.
        """
        u, s, vh = self.svd()
        eps = torch.finfo(s.dtype).eps
        largest = (eps * max(self.shape) if rtol is None else rtol) * s[:1].sum()
        # a sum that cancels leaves noise; what counts as noise is relative to the terms
        noise = eps * torch.linalg.vector_norm(self.left)
        if self.right is not None:
            noise = noise * torch.linalg.vector_norm(self.right)
        # without numbers (on the meta device) it is the rank that there can be
        rank = len(s) if s.is_meta else int((s > torch.maximum(largest, noise)).sum())
        return Delta(u[:, :rank], s[:rank, None] * vh[:rank])

    def split(self, rank: int) -> tuple[Delta, Delta]:
        """The best approximation of rank at most `rank` in Frobenius norm (eq. 17-18), and what it
        leaves out, from one SVD."""
        u, s, vh = self.svd()
        head = Delta(u[:, :rank], s[:rank, None] * vh[:rank])
        return head, Delta(u[:, rank:] * s[rank:], vh[rank:])

    def keeping(self, energy: float) -> Delta:
        """The best approximation of the least rank p with Σ_{j≤p} σⱼ² ≥ energy·Σⱼ σⱼ².

        Without numbers (on the meta device) it is the rank that there can be.

        Example:
            >>> of = Delta(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
            >>> of.keeping(0.6).dense().diag().tolist()
            [0.0, 4.0, 0.0]
        """
        u, s, vh = self.svd()
        squares = s.double().square().cumsum(0)
        whole = s.is_meta or energy == 1 or not len(s)
        rank = len(s) if whole else int((squares < energy * squares[-1]).sum()) + 1
        return Delta(u[:, :rank], s[:rank, None] * vh[:rank])

    def norm(self) -> Tensor:
        """‖ΔW‖_F, without forming the matrix: ‖LR‖² = Σ (LᵀL)∘(RRᵀ).

        Inner products lose the digits that cancel in a sum. So float32 factors are multiplied in
        float32 only where hardly anything cancels, else in float64; those in float64 go by QR.
        """
        if self.right is None:
            return torch.linalg.vector_norm(self.left)
        if self.left.dtype == torch.float64:
            return torch.linalg.vector_norm(torch.linalg.qr(self.left, mode="r").R @ self.right)
        square, size = _gram_square(self.left, self.right)
        if square < 0.1 * size:  # norm² against Σ‖lⱼ‖²‖rⱼ‖²
            square, _ = _gram_square(self.left.double(), self.right.double())
        return square.clamp_min(0).sqrt().to(self.left.dtype)


def _gram_square(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    both = (left.mT @ left).double() * (right @ right.mT).double()
    return both.sum(), both.diagonal().sum()


def concat(terms: Iterable[Delta]) -> Delta:
    """The sum of the terms as factors; ranks add up.

    Example:
        >>> concat([Delta(torch.ones(2, 1), torch.ones(1, 2)), Delta(torch.ones(2, 2))]).dense()
        tensor([[2., 2.],
                [2., 2.]])
    """
    lefts, rights = zip(*(term.factors() for term in terms))
    return Delta(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))
