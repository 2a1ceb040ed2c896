"""FLoRA-NA: one pair, combined from the clients' factors, that is nearest to the ideal product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.statistics import Statistics

_SWEEPS = 50
_RANK = 1e-10  # of a k × k system, relative: clients that agree make it singular


@dataclass(frozen=True)
class Fitted(Assignment):
    """B' = Σ qᵢBᵢ and A' = Σ pᵢAᵢ, where p and q (k numbers each) minimise

        ‖Σ wᵢBᵢAᵢ − (Σ qᵢBᵢ)(Σ pᵢAᵢ)‖_F.

    For given p the best q solves a k × k system, and the other way round; they are solved in turn
    from p = q = w, which is plain averaging, so the pair is never worse than that. All that is
    needed of the factors are inner products: no out × in matrix is formed. What is still missed is
    dropped. The paper finds p and q by gradient descent.

    Source:
        Nguyen et al., "FLoRA-NA", arXiv 2509.26399.
    """

    name = "fitted pair"
    needs = frozenset({"product", "ends"})

    def assign(self, s: Statistics) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        if s.hollow:
            return Assigned(s.mean)
        assert s.product is not None
        b = torch.stack([x.end.B for x in s.ends]).double()  # k × out × r
        a = torch.stack([x.end.A for x in s.ends]).double()  # k × r × in
        left, right = (t.double() for t in s.product.factors())
        # ⟨BᵤAᵥ, P⟩, and all Bᵤᵀ Bᵥ and Aᵤ Aᵥᵀ
        ideal = torch.einsum("uoi,oc,cn,vin->uv", b, left / s.layer.scale, right, a)
        bb, aa = torch.einsum("uoi,voj->uvij", b, b), torch.einsum("uin,vjn->uvij", a, a)
        p = q = torch.tensor([x.weight for x in s.ends], dtype=b.dtype, device=b.device)
        for _ in range(_SWEEPS):
            gram = torch.einsum("uvij,xyij,x,y->uv", bb, aa, p, p)
            q = _solved(gram, ideal @ p, q)
            gram = torch.einsum("uvij,xyij,x,y->uv", aa, bb, q, q)
            p = _solved(gram, ideal.mT @ q, p)
        found_b = torch.einsum("u,uoi->oi", q, b).to(s.mean.B.dtype)
        found_a = torch.einsum("u,uin->in", p, a).to(s.mean.A.dtype)
        return Assigned(replace(s.mean, A=found_a, B=found_b))


def _solved(gram: Tensor, right: Tensor, near: Tensor) -> Tensor:
    """The solution of gram · x = right that is nearest to `near`."""
    import torch  # noqa: PLC0415

    inverse = torch.linalg.pinv(gram, rtol=_RANK, hermitian=True)
    return near + inverse @ (right - gram @ near)
