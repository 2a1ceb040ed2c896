"""What the clients' factors of one layer amount to: the sums from which factors are assigned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedex_lora.aggregation.adapter import Factors, LayerShape
from fedex_lora.aggregation.covariance import Covariance
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.running_sum import RunningSum


@dataclass(frozen=True)
class End:
    """One client of a round, at the layer's full rank and in units of its scale.

    Attributes:
        weight: wᵢ.
        start: Bᵢ⁰ and Aᵢ⁰.
        end: Bᵢ and Aᵢ.
    """

    weight: float
    start: Factors
    end: Factors


@dataclass(frozen=True)
class Statistics:
    """Means, and what an assignment asked for beside them; weights wᵢ = nᵢ / Σn sum to 1.

    Attributes:
        layer: The layer's shape; the rank is the largest of any client.
        eta: η, the server's learning rate.
        both: Whether clients sent both factors, so that means and products differ.
        start: B⁰ and A⁰ of the first client.
        mean: B̄ and Ā.
        covariance: s·Σ wᵢ(Bᵢ − B̄)(Aᵢ − Ā) = s·(Σ wᵢBᵢAᵢ − B̄Ā); None of one client, or of one
            factor alone.
        product: Σ wᵢsᵢ·(Bᵢ⁰Aᵢ⁰ + η(BᵢAᵢ − Bᵢ⁰Aᵢ⁰)), if asked for.
        increment: η·Σ wᵢsᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰), if asked for.
        ends: Every client in the order in which they were added, if asked for.
        gradient: Σ wᵢGᵢ of the layer's whole weight (out × in), in a round in which that is sent.
    """

    layer: LayerShape
    eta: float
    both: bool
    start: Factors
    mean: Factors
    covariance: Delta | None = None
    product: Delta | None = None
    increment: Delta | None = None
    ends: tuple[End, ...] = ()
    gradient: Tensor | None = None

    @property
    def hollow(self) -> bool:
        """Whether there are shapes and no numbers, as `plan` asks."""
        return self.mean.A.is_meta

    @property
    def moved(self) -> Factors:
        """B⁰ + η(B̄ − B⁰) and A⁰ + η(Ā − A⁰)."""
        if self.eta == 1:
            return self.mean
        b = self.start.B + self.eta * (self.mean.B - self.start.B)
        a = self.start.A + self.eta * (self.mean.A - self.start.A)
        return Factors(a, b, self.layer.scale)

    @property
    def averages_miss(self) -> Delta | None:
        """What `moved` leaves out of G': s·(η·covariance + (η − η²)·(B̄ − B⁰)(Ā − A⁰))."""
        if self.eta == 1 or not self.both:
            return self.covariance
        d, e = self.mean.B - self.start.B, self.mean.A - self.start.A
        both = Delta(d * (self.layer.scale * (self.eta - self.eta**2)), e)
        return both if self.covariance is None else both + self.covariance.scaled(self.eta)

    def missing(self, e: Delta) -> Statistics:
        """The same where G is to move by η·E more than the means say, unscaled: E is missed by
        them as a covariance is, and part of the sums."""
        more = e.scaled(self.eta)
        return replace(
            self,
            both=True,
            covariance=e if self.covariance is None else self.covariance + e,
            product=None if self.product is None else self.product + more,
            increment=None if self.increment is None else self.increment + more,
        )

    def best_pair(self) -> Factors:
        """B'A' nearest to `product` at the layer's rank: A' orthonormal rows, B' = UΣ/s."""
        return self.split_product()[0]

    def split_product(self) -> tuple[Factors, Delta]:
        """`best_pair`, and what it leaves out of `product`."""
        assert self.product is not None
        rank = self.layer.rank
        u, s, vh = self.product.svd()
        missing = max(0, rank - s.shape[0])
        b = pad(u[:, :rank] * s[:rank] / self.layer.scale, (0, missing))
        a = orthonormal_rows(pad(vh[:rank], (0, 0, 0, missing)))
        rest = Delta(u[:, rank:] * s[rank:], vh[rank:])
        return Factors(a.contiguous(), b.contiguous(), self.layer.scale), rest

    def norms(self) -> tuple[float, float]:
        """The deviation, ‖Σ wᵢsᵢBᵢAᵢ − s·B̄Ā‖_F, and ‖Σ wᵢsᵢBᵢAᵢ‖_F."""
        mean = Delta(self.mean.B * self.layer.scale, self.mean.A)
        if self.covariance is None:
            return 0.0, mean.norm().item()
        return self.covariance.norm().item(), (self.covariance + mean).norm().item()


class LayerSums:
    """The running sums over clients for one layer.

    Args:
        needs: As an assignment states them.
        trained: Which factors the server is sent, of "A" and "B".
        clients: How many are expected.
    """

    def __init__(
        self,
        layer: LayerShape,
        needs: frozenset[str],
        trained: frozenset[str],
        eta: float,
        clients: int,
    ) -> None:
        self.layer, self.needs, self.eta = layer, needs, eta
        self.both = trained == {"A", "B"}
        self._start: Factors | None = None
        self._moments = Covariance(clients, terms=self.both)
        self._product, self._increment = RunningSum(clients), RunningSum(2 * clients)
        self._ends: list[End] = []

    def add(self, n: float, start: Factors, end: Factors) -> None:
        """Takes in one client: where it began and where it ended, its weight n > 0."""
        start, end = self.full(start), self.full(end)
        self._start = self._start or start
        self._moments.add(n, end.B, end.A)
        c, began = self.layer.scale * n, bool(self.needs) and bool(start.B.any())
        if "ends" in self.needs:
            self._ends.append(End(n, start, end))
        if "product" in self.needs:  # B⁰A⁰ + η(BA − B⁰A⁰)
            self._product.add(end.B, end.A, c * self.eta)
            if self.eta != 1 and began:
                self._product.add(start.B, start.A, c * (1 - self.eta))
        if "increment" in self.needs:  # BA − B⁰A⁰ = D·A + B⁰·E
            self._increment.add(end.B - start.B, end.A, c)
            if began:
                self._increment.add(start.B, end.A - start.A, c)

    def combine(self, other: LayerSums) -> None:
        """Takes in all clients of another aggregate of the same round."""
        self._start = self._start or other._start
        self._moments.combine(other._moments)
        self._product.combine(other._product)
        self._increment.combine(other._increment)
        self._ends += other._ends

    def finish(self) -> Statistics:
        """The statistics of all clients added; to be called once."""
        assert self._start is not None, "no client was added"
        total = self._moments.weight
        b, a = self._moments.means()
        return Statistics(
            self.layer,
            self.eta,
            self.both,
            self._start,
            Factors(a, b, self.layer.scale),
            self._moments.spread(self.layer.scale),
            self._product.total(1 / total),
            self._increment.total(self.eta / total),
            tuple(End(x.weight / total, x.start, x.end) for x in self._ends),
        )

    def full(self, f: Factors) -> Factors:
        """Zero-padded to the full rank, B in units of the layer's scale."""
        return padded(f, self.layer)


def padded(f: Factors, layer: LayerShape) -> Factors:
    """Zero-padded to the layer's rank, B in units of the layer's scale."""
    ratio, missing = f.scale / layer.scale, layer.rank - f.rank
    b = f.B if ratio == 1 else f.B * ratio
    if not missing:
        return Factors(f.A, b, layer.scale)
    return Factors(pad(f.A, (0, 0, 0, missing)), pad(b, (0, missing)), layer.scale)


def orthonormal_rows(a: Tensor) -> Tensor:
    """`a` (r, n) with rows that are orthonormal or zero, the zero ones replaced.

    The new rows are the unit vectors least covered so far, orthogonalised: a function of `a`. Rows
    beyond the n that there can be stay zero.
    """
    a = a.clone()
    missing = torch.nonzero(torch.linalg.vector_norm(a, dim=1) < 0.5).flatten().tolist()
    a[missing] = 0
    for i in missing[: max(0, a.shape[1] - (a.shape[0] - len(missing)))]:
        unit = torch.zeros_like(a[i])
        unit[(a**2).sum(0).argmin()] = 1
        for _ in range(2):  # the second pass removes what rounding left of the first
            unit = unit - a.mT @ (a @ unit)
        a[i] = unit / torch.linalg.vector_norm(unit)
    return a
