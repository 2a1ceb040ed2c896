"""From the clients' factors to the ideal global model, the next factors and the residual.

The residual Σ wᵢBᵢAᵢ − B̄Ā equals the covariance Σ wᵢ(Bᵢ − B̄)(Aᵢ − Ā). It is computed as one
computes a covariance, by Welford's update on the drifts D = B − B₁ and E = A − A₁ from where the
first client ended, so nothing cancels and no out × in matrix is formed. (A covariance is the same
from any reference; the factors the round began with would do as well, but had to be read besides.)

    term_j = (n_j·N_{j−1}/N_j) · (D_j − D̄_{j−1})(E_j − Ē_{j−1}),   residual = Σ_{j≥2} term_j / N_k

The terms are a factorisation of rank at most (k−1)·r. Clients must be added in sorted order of
their names; the result then depends on nothing else, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedex_lora.aggregation.adapter import AdapterState, Factors, Site
from fedex_lora.aggregation.ledger import Increment
from fedex_lora.aggregation.lowrank import LowRank, factored, partial_norms, smaller
from fedex_lora.aggregation.methods import Method
from fedex_lora.aggregation.running_sum import RunningSum

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]  # B and A
_AT_ONCE = 4  # clients taken in at once: a site's sums are then read and written once for all


@dataclass(frozen=True)
class Aggregate:
    """What one round's updates amount to.

    Attributes:
        factors: By site, what "average" and "svd" assign, at the site's full rank (η applied).
        increment: By site, what `factors` leave out of G' (average, reinit), or G' − G where the
            base is per client. Empty where the method's residual is zero.
        head: Averaged head (η applied).
        deviation: By site, ‖Σ wᵢsᵢBᵢAᵢ − s·B̄Ā‖_F: what plain averaging would miss.
        ideal: By site, ‖Σ wᵢsᵢBᵢAᵢ‖_F.
    """

    factors: Mapping[str, Factors]
    increment: Increment
    head: Mapping[str, Tensor]
    deviation: Mapping[str, float]
    ideal: Mapping[str, float]


class Aggregator:
    """Streaming aggregation: `add` each client in sorted order, then `finish`.

    Args:
        method: Row of the methods table.
        sites: Shapes; the rank is the largest of any client.
        trained: Which factors the clients train this round, of "A" and "B".
        server_learning_rate: η in G' = G + η·Σ wᵢsᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰).
        clients: How many are expected, if known; for them memory is taken once.

    Example:
        >>> from fedex_lora.aggregation.adapter import Site, Factors, AdapterState
        >>> from fedex_lora.aggregation.lowrank import dense
        >>> from fedex_lora.aggregation.methods import METHODS
        >>> site = Site(out=2, inp=2, rank=1, scale=2.0)
        >>> def state(a, b):
        ...     f = Factors(torch.tensor([[a, 0.0]]), torch.tensor([[b], [0.0]]), 2.0)
        ...     return AdapterState({"q": f})
        >>> agg = Aggregator(METHODS["fedex"], {"q": site}, frozenset("AB"))
        >>> agg.add(1, state(1.0, 0.0), state(1.0, 1.0))
        >>> agg.add(1, state(1.0, 0.0), state(3.0, 3.0))
        >>> out = agg.finish()
        >>> (out.factors["q"].delta().dense() + dense(out.increment["q"]))[0, 0].item()
        10.0
    """

    def __init__(
        self,
        method: Method,
        sites: Mapping[str, Site],
        trained: frozenset[str],
        server_learning_rate: float = 1.0,
        clients: int = 2,
    ) -> None:
        eta = server_learning_rate
        groups: dict[Site, list[str]] = {}
        for name, site in sites.items():
            groups.setdefault(site, []).append(name)
        self._groups = [
            _Group(site, names, method, trained, eta, clients) for site, names in groups.items()
        ]
        self._eta = eta
        self._head: dict[str, Tensor] = {}
        self._head_start: Mapping[str, Tensor] = {}
        self.clients = 0
        self.weight = 0.0

    def add(self, weight: float, start: AdapterState, end: AdapterState) -> None:
        """Takes in one client: where it started, where it ended, its unnormalised weight n > 0.

        The tensors must stay as they are until `finish`; some are read only then.
        """
        self.clients += 1
        self.weight += weight
        for group in self._groups:
            group.add(weight, self.weight, start.sites, end.sites)
        self._head_start = self._head_start or start.head
        for name, value in end.head.items():
            drift = value - start.head[name]
            mean = self._head.get(name)
            step = weight / self.weight
            self._head[name] = drift if mean is None else mean + step * (drift - mean)

    def finish(self, norms: bool = True) -> Aggregate:
        """The aggregate of all clients added; at least one is needed. To be called once.

        Args:
            norms: Whether to measure `deviation` and `ideal`, which takes longer than the rest.
        """
        assert self.clients, "no client was added"
        results = [group.finish(self.weight, norms) for group in self._groups]
        head = {n: self._head_start[n] + self._eta * d for n, d in self._head.items()}
        return Aggregate(
            _merged(r.factors for r in results),
            _merged(r.increment for r in results),
            head,
            _merged(r.deviation for r in results),
            _merged(r.ideal for r in results),
        )


class _Group:
    """The sums over clients for sites of equal shape, stacked along the first dimension."""

    def __init__(
        self,
        site: Site,
        names: Sequence[str],
        method: Method,
        trained: frozenset[str],
        eta: float,
        clients: int,
    ) -> None:
        self.site, self.names, self.method = site, names, method
        self.trained, self.eta = trained, eta
        self.start: list[Pair] = []  # the first client's start and end, by site
        self.first: list[Pair] = []
        self.waiting: list[tuple[float, float, list[Pair]]] = []  # nⱼ, Nⱼ, ends by site
        self.mean: Pair | None = None  # D̄ and Ē
        self.spread, self.unit = RunningSum(clients - 1), 1.0  # in this unit, to multiply once
        self.product, self.increment = RunningSum(clients), RunningSum(2 * clients)

    def add(
        self, n: float, total: float, start: Mapping[str, Factors], end: Mapping[str, Factors]
    ) -> None:
        ends = [self._full(end[name]) for name in self.names]
        if not self.first:
            self.start, self.first = [self._full(start[name]) for name in self.names], ends
        else:
            self.waiting.append((n, total, ends))
        if len(self.waiting) == _AT_ONCE:
            self._take_waiting()
        self._add_products(n, start, end)

    def _add_products(
        self, n: float, start: Mapping[str, Factors], end: Mapping[str, Factors]
    ) -> None:
        if not self._needs_product() and self.method.shared_base:
            return
        b0, a0 = _stack([self._full(start[name]) for name in self.names])
        b, a = _stack([self._full(end[name]) for name in self.names])
        scale = self.site.scale * n
        if self._needs_product():  # B⁰A⁰ + η(BA − B⁰A⁰)
            self.product.add(LowRank(b, a), scale * self.eta)
            if self.eta != 1 and b0.any():
                self.product.add(LowRank(b0, a0), scale * (1 - self.eta))
        if not self.method.shared_base:  # BA − B⁰A⁰ = D·A + B⁰·E
            self.increment.add(LowRank(b - b0, a), scale)
            if b0.any():
                self.increment.add(LowRank(b0, a - a0), scale)

    def _needs_product(self) -> bool:
        return self.method.assignment in ("reinit", "svd")

    def _take_waiting(self, last: bool = False) -> None:
        """Welford's update for the clients that wait, one site after the other.

        Args:
            last: Nobody follows: `mean` becomes B̄ and Ā themselves.
        """
        fresh = self.mean is None
        if self.mean is None:
            b, a = (t.new_empty(len(self.names), *t.shape) for t in self.first[0])
            self.mean, self.unit = (b, a), self.site.scale / (self.waiting or [(0, 1)])[-1][1]
        shares = [n / total for n, total, _ in self.waiting]
        cs = [self.unit * n * (1 - n / total) for n, total, _ in self.waiting]
        places: list[LowRank] = []
        if self.waiting and self.trained == {"A", "B"}:
            places = self.spread.places(LowRank(*self.mean), len(self.waiting))
        for i, first in enumerate(self.first):
            drifts = [place.left[i] for place in places], [place.right[i] for place in places]
            for x, factors in ((0, cs), (1, None)):
                mean, ends = self.mean[x][i], [ends[i][x] for _, _, ends in self.waiting]
                _welford(mean, first[x], ends, shares, drifts[x], factors, fresh)
                if last:
                    mean.add_(first[x])
        self.waiting = []

    def _full(self, f: Factors) -> Pair:
        """(B, A) of one site, zero-padded to the full rank, B in units of the site's scale."""
        ratio, missing = f.scale / self.site.scale, self.site.rank - f.rank
        b = f.B if ratio == 1 else f.B * ratio
        return (pad(b, (0, missing)), pad(f.A, (0, 0, 0, missing))) if missing else (b, f.A)

    def finish(self, total: float, norms: bool) -> Aggregate:
        self._take_waiting(last=True)
        assert self.mean is not None
        mean, spread = self.mean, self.spread.total(self.site.scale / total / self.unit)
        deviation, ideal = _norms(mean, self.site.scale, spread) if norms else ([], [])
        factors, increment = self._assign(total, mean, spread)
        return Aggregate(
            factors,
            _by_site(self.names, increment),
            {},
            dict(zip(self.names, deviation)),
            dict(zip(self.names, ideal)),
        )

    def _assign(
        self, total: float, mean: Pair, spread: LowRank | Tensor | None
    ) -> tuple[dict[str, Factors], LowRank | Tensor | None]:
        """The factors the clients get next, and what of G' goes into the base."""
        if self.method.assignment == "average":
            return self._average(mean, spread)
        target = self.product.total(1 / total)
        if self.method.assignment == "reinit":  # B' = 0: all of G' − base
            return {}, target
        factors = self._factor(target) if target is not None else {}
        return factors, self.increment.total(self.eta / total)

    def _average(
        self, mean: Pair, spread: LowRank | Tensor | None
    ) -> tuple[dict[str, Factors], LowRank | Tensor | None]:
        """B' = B⁰ + ηD̄, A' = A⁰ + ηĒ; G' − base − s·B'A' = s·(η·spread + (η − η²)·D̄Ē)."""
        if self.eta != 1:
            (b, a), eta = _stack(self.start), self.eta
            d, e = mean[0] - b, mean[1] - a
            mean = b + eta * d, a + eta * e
            if self.trained == {"A", "B"}:
                both = LowRank(d * (self.site.scale * (eta - eta**2)), e)
                spread = _plus(both, _times(spread, eta))
        dropped = self.method.residual in ("zero", "dropped")
        return self._factors(*mean), None if dropped else spread

    def _factor(self, target: LowRank | Tensor) -> dict[str, Factors]:
        """A' = the top r right singular vectors, completed to orthonormal rows; B' = UΣ/s."""
        u, s, vh = factored(target).svd()
        rank, missing = self.site.rank, max(0, self.site.rank - s.shape[-1])
        b = u[..., :rank] * s[..., None, :rank] / self.site.scale
        a = vh[..., :rank, :]
        if missing:
            b, a = pad(b, (0, missing)), pad(a, (0, 0, 0, missing))
        return self._factors(b, orthonormal_rows(a))

    def _factors(self, b: Tensor, a: Tensor) -> dict[str, Factors]:
        return {
            name: Factors(a[i].contiguous(), b[i].contiguous(), self.site.scale)
            for i, name in enumerate(self.names)
        }


def orthonormal_rows(a: Tensor) -> Tensor:
    """`a` (..., r, n) with rows that are orthonormal or zero, the zero ones replaced.

    The new rows are the unit vectors least covered so far, orthogonalised: a function of `a`. Of
    orthonormal rows there are n at most; where r > n the others are zero.
    """
    a = a.clone()
    norm = torch.linalg.vector_norm
    for i in range(a.shape[-2]):
        for index in torch.nonzero(norm(a[..., i, :], dim=-1) < 0.5).tolist():
            rows = a[tuple(index)]
            rows[i] = 0
            if (norm(rows, dim=-1) >= 0.5).sum() >= rows.shape[1]:
                continue
            unit = torch.zeros_like(rows[i])
            unit[(rows**2).sum(0).argmin()] = 1
            for _ in range(2):  # the second pass removes what rounding left of the first
                unit = unit - rows.mT @ (rows @ unit)
            rows[i] = unit / norm(unit)
    return a


def _welford(
    mean: Tensor,
    first: Tensor,
    ends: Sequence[Tensor],
    shares: Sequence[float],
    drifts: Sequence[Tensor],
    cs: Sequence[float] | None,
    fresh: bool,
) -> None:
    """Welford's update of one factor X of one site: X̄ in `mean`, and Xⱼ − X̄ⱼ₋₁ in `drifts`.

    Args:
        mean: X̄ − X₁.
        first: X₁.
        ends: Xⱼ of some clients, in order; `shares`: their nⱼ/Nⱼ.
        drifts: Where to write to, or nothing if that is not needed; `cs`: factors to multiply by.
        fresh: Nobody came before: `mean` is 0, whatever it holds.
    """
    if fresh and not ends:
        mean.zero_()
    for j, (end, share) in enumerate(zip(ends, shares)):
        drift = torch.sub(end, first, out=None if cs or not drifts else drifts[j])
        if fresh and not j:
            torch.mul(drift, share, out=mean)
        else:
            mean.add_(drift.sub_(mean), alpha=share)
        if cs and drifts:
            torch.mul(drift, cs[j], out=drifts[j])


def _stack(pairs: Sequence[Pair]) -> Pair:
    """(B, A) of all sites, each along a new first dimension."""
    return torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs])


def _merged(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}


def wire_form(w: LowRank | Tensor) -> LowRank | Tensor:
    """Orthonormal basis × coefficients, or dense where that holds fewer numbers."""
    if not isinstance(w, LowRank):
        return w
    w = smaller(w)  # type: ignore[assignment]
    return w.orthonormal() if isinstance(w, LowRank) else w


def _by_site(names: Sequence[str], w: LowRank | Tensor | None) -> Increment:
    if w is None:
        return {}
    if isinstance(w, LowRank):
        return {name: LowRank(w.left[i], w.right[i]) for i, name in enumerate(names)}
    return {name: w[i] for i, name in enumerate(names)}


def _times(w: LowRank | Tensor | None, c: float) -> LowRank | Tensor | None:
    if w is None:
        return None
    return w.scaled(c) if isinstance(w, LowRank) else w * c


def _plus(w: LowRank, other: LowRank | Tensor | None) -> LowRank | Tensor:
    if other is None:
        return w
    return w + other if isinstance(other, LowRank) else w.dense() + other


def _norms(
    mean: Pair, scale: float, spread: LowRank | Tensor | None
) -> tuple[list[float], list[float]]:
    """‖spread‖_F and ‖scale·B̄Ā + spread‖_F of every site; site by site, to stay in the cache."""
    found = [_norms_of(LowRank(b * scale, a), w) for b, a, w in zip(*mean, _each(spread, mean))]
    return [d for d, _ in found], [i for _, i in found]


def _norms_of(mean: LowRank, spread: LowRank | Tensor | None) -> tuple[float, float]:
    if spread is None:
        return 0.0, mean.norm().item()
    if isinstance(spread, LowRank):
        deviation, ideal = partial_norms(spread, mean)
        return deviation.item(), ideal.item()
    norm = torch.linalg.vector_norm
    return norm(spread).item(), norm(torch.addmm(spread, mean.left, mean.right)).item()


def _each(w: LowRank | Tensor | None, mean: Pair) -> Iterable[LowRank | Tensor | None]:
    """The sites of a stack, one by one."""
    if w is None:
        return [None] * len(mean[0])
    return map(LowRank, w.left, w.right) if isinstance(w, LowRank) else w
