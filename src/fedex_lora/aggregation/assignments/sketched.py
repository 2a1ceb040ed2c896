"""FedASK: both factors anew each round, from two linear sketches of the clients' products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Svd

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class Sketched(Svd):
    """The best pair for P = Σ wᵢsBᵢAᵢ as far as two sketches of it tell, both sums over clients:

        Y = Σ wᵢ·sBᵢ(AᵢΩ)    (out × (r + p)),    Q = orth(Y)
        Z = Σ wᵢ·(QᵀsBᵢ)Aᵢ   ((r + p) × in),     Z = UΣVᵀ, cut to rank r
        B' = QU·(Σ/s)^½,  A' = (Σ/s)^½·Vᵀ

    which is exact as soon as r + p is the rank of P. Where B alone is trained, P = sB̄A has rank r:
    no p is needed, and the global model is exact. Noise that DP-SGD put into B is multiplied by a
    fixed A, never by noise, and A moves nevertheless.

    The paper's clients answer twice, with their parts of Y and, told Q, of Z. Of one client the two
    amount to its product BᵢAᵢ, which has rank r, in more numbers than its factors have. So factors
    are sent here, and both sums made of them. Under secure aggregation, where nobody sees a single
    client's, sketches are summed, in one exchange, which takes ΨP with random Ψ for QᵀP: of a width
    that loses nothing, or of `privacy.secure_aggregation.rank`.

    A singular value of zero would end a pair's column for good, as gradients of both sides vanish
    with it; its row of A is of norm 1 here.

    Attributes:
        oversampling: p, at least 0.

    Source:
        Wen, Zhu, Xu, Zhou, Han, "Differentially Private Federated Low Rank Adaptation Beyond
        Fixed-Matrix", arXiv 2507.09990; Halko et al., arXiv 0909.4061, for Q.
    """

    name = "sketched svd, balanced"
    sketched = True

    oversampling: int = 8

    def assign(self, s: Statistics) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        from fedex_lora.aggregation.adapter import Factors  # noqa: PLC0415
        from fedex_lora.aggregation.delta import Delta  # noqa: PLC0415

        assert s.product is not None
        dtype, (left, right) = s.mean.B.dtype, s.product.to(torch.float64).factors()
        y = left @ (right @ omega(s.layer.inp, s.layer.rank + self.oversampling).to(right))
        q = torch.linalg.qr(y).Q
        pair = replace(s, product=Delta(q, (q.mT @ left) @ right)).best_pair()
        root = torch.linalg.vector_norm(pair.B, dim=0).sqrt()  # of Σ/s
        noise = (torch.finfo(dtype).eps * max(s.product.shape)) ** 0.5 * root.amax()
        root = torch.where(root > noise, root, 1.0)
        a, b = pair.A * root[:, None], pair.B / root
        return Assigned(Factors(a.to(dtype), b.to(dtype), pair.scale))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.oversampling < 0:
            yield f"oversampling: expected a number of at least 0, got {self.oversampling}"


def omega(inp: int, width: int) -> Tensor:
    """Ω (in × width), standard normal, float64: a function of its size, known to everybody."""
    import torch  # noqa: PLC0415 (the table is read without it)

    from fedex_lora.aggregation.seeding import derive  # noqa: PLC0415

    generator = torch.Generator().manual_seed(derive(0, "Ω", inp, width))
    return torch.randn(inp, width, generator=generator, dtype=torch.float64)
