"""From the clients' factors to the ideal global model, the next factors and the residual.

The residual Σ wᵢBᵢAᵢ − B̄Ā equals the covariance Σ wᵢ(Bᵢ − B̄)(Aᵢ − Ā). It is computed as one
computes a covariance, by Welford's update on the drifts D = B − B⁰ and E = A − A⁰ from the
factors the round began with, so nothing cancels and no out × in matrix is formed:

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

from fedex_lora.adapter import AdapterState, Factors, Site
from fedex_lora.ledger import Increment
from fedex_lora.lowrank import LowRank, factored, partial_norms, smaller
from fedex_lora.methods import Method
from fedex_lora.running_sum import RunningSum

T = TypeVar("T")


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
        >>> from fedex_lora.adapter import Site, Factors, AdapterState
        >>> from fedex_lora.lowrank import dense
        >>> from fedex_lora.methods import METHODS
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
        """Takes in one client: where it started, where it ended, its unnormalised weight n > 0."""
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

    def finish(self) -> Aggregate:
        """The aggregate of all clients added; at least one is needed."""
        assert self.clients, "no client was added"
        results = [group.finish(self.weight) for group in self._groups]
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
        self.reference: tuple[Tensor, Tensor] | None = None  # (B⁰, A⁰) of the first client
        self.mean_d: Tensor | None = None
        self.mean_e: Tensor | None = None
        self.spread = RunningSum(clients - 1)
        self.product, self.increment = RunningSum(clients), RunningSum(2 * clients)

    def add(
        self, n: float, total: float, start: Mapping[str, Factors], end: Mapping[str, Factors]
    ) -> None:
        self._add_spread(n, total, start, end)
        if not self._needs_product() and self.method.shared_base:
            return
        b0, a0 = self._stack(start)
        b, a = self._stack(end)
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

    def _add_spread(
        self, n: float, total: float, start: Mapping[str, Factors], end: Mapping[str, Factors]
    ) -> None:
        if self.reference is None:
            self.reference = self._stack(start)
        d, e = self._stack(end, minus=self.reference)
        if self.mean_d is None or self.mean_e is None:
            self.mean_d, self.mean_e = d, e
            return
        d -= self.mean_d
        e -= self.mean_e
        self.mean_d.add_(d, alpha=n / total)
        self.mean_e.add_(e, alpha=n / total)
        if self.trained == {"A", "B"}:
            self.spread.add(LowRank(d, e), n * (total - n) / total)

    def _stack(
        self, factors: Mapping[str, Factors], minus: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, A) of all sites, zero-padded to the full rank, B in units of the site's scale.

        Args:
            minus: What to take away from them, stacked likewise.
        """
        chosen = [factors[name] for name in self.names]
        missing = self.site.rank - chosen[0].rank
        ratio = chosen[0].scale / self.site.scale
        if minus is not None and not missing and ratio == 1:  # in one pass over memory
            b, a = torch.empty_like(minus[0]), torch.empty_like(minus[1])
            for i, f in enumerate(chosen):
                torch.sub(f.B, minus[0][i], out=b[i])
                torch.sub(f.A, minus[1][i], out=a[i])
            return b, a
        b, a = torch.stack([f.B for f in chosen]), torch.stack([f.A for f in chosen])
        b = b if ratio == 1 else b * ratio
        b, a = (pad(b, (0, missing)), pad(a, (0, 0, 0, missing))) if missing else (b, a)
        return (b, a) if minus is None else (b - minus[0], a - minus[1])

    def finish(self, total: float) -> Aggregate:
        assert self.reference and self.mean_d is not None and self.mean_e is not None
        b0, a0 = self.reference
        mean = LowRank((b0 + self.mean_d) * self.site.scale, a0 + self.mean_e)
        spread = self.spread.total(self.site.scale / total)
        factors, increment = self._assign(total, spread)
        deviation, ideal = _norms(mean, spread)
        return Aggregate(
            factors,
            _by_site(self.names, increment),
            {},
            dict(zip(self.names, deviation.tolist())),
            dict(zip(self.names, ideal.tolist())),
        )

    def _assign(
        self, total: float, spread: LowRank | Tensor | None
    ) -> tuple[dict[str, Factors], LowRank | Tensor | None]:
        """The factors the clients get next, and what of G' goes into the base."""
        if self.method.assignment == "average":
            return self._average(spread)
        target = self.product.total(1 / total)
        if self.method.assignment == "reinit":  # B' = 0: all of G' − base
            return {}, target
        factors = self._factor(target) if target is not None else {}
        return factors, self.increment.total(self.eta / total)

    def _average(
        self, spread: LowRank | Tensor | None
    ) -> tuple[dict[str, Factors], LowRank | Tensor | None]:
        """B' = B⁰ + ηD̄, A' = A⁰ + ηĒ; G' − base − s·B'A' = s·(η·spread + (η − η²)·D̄Ē)."""
        assert self.reference and self.mean_d is not None and self.mean_e is not None
        eta = self.eta
        b = self.reference[0] + eta * self.mean_d
        a = self.reference[1] + eta * self.mean_e
        factors = self._factors(b, a)
        if eta != 1 and self.trained == {"A", "B"}:
            both = LowRank(self.mean_d * (self.site.scale * (eta - eta**2)), self.mean_e)
            spread = _plus(both, _times(spread, eta))
        return factors, None if self.method.residual in ("zero", "dropped") else spread

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

    The new rows are the unit vectors least covered so far, orthogonalised: a function of `a`.
    """
    a = a.clone()
    for i in range(a.shape[-2]):
        for index in torch.nonzero(torch.linalg.vector_norm(a[..., i, :], dim=-1) < 0.5).tolist():
            rows = a[tuple(index)]
            rows[i] = 0
            unit = torch.zeros_like(rows[i])
            unit[(rows**2).sum(0).argmin()] = 1
            for _ in range(2):  # the second pass removes what rounding left of the first
                unit = unit - rows.mT @ (rows @ unit)
            rows[i] = unit / torch.linalg.vector_norm(unit)
    return a


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


def _norms(mean: LowRank, spread: LowRank | Tensor | None) -> tuple[Tensor, Tensor]:
    """‖spread‖_F and ‖mean + spread‖_F of every site."""
    if spread is None:
        return torch.zeros(mean.shape[0]), mean.norm()
    if isinstance(spread, LowRank):
        deviation, ideal = partial_norms(spread, mean)
        return deviation, ideal
    norm = torch.linalg.vector_norm  # site by site: a second dense sum would double the memory
    ideal = [norm(torch.addmm(w, x, y)) for w, x, y in zip(spread, mean.left, mean.right)]
    return norm(spread, dim=(-2, -1)), torch.stack(ideal)
