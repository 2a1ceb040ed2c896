"""From the clients' factors to the next factors, the residual and the head of one round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedex_lora.aggregation.adapter import (
    AdapterState,
    Factors,
    LayerShape,
    inner_name,
    weight_name,
)
from fedex_lora.aggregation.assignment import Assigned
from fedex_lora.aggregation.combining import Combining
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Increment
from fedex_lora.aggregation.methods import Method
from fedex_lora.aggregation.robust import aligned, krum, middle, trimmed
from fedex_lora.aggregation.statistics import LayerSums, Statistics
from fedex_lora.errors import UserError

_AT_ONCE = (
    4  # clients taken in layer by layer: a layer's sums are then in the cache for all of them
)


@dataclass(frozen=True)
class Aggregate:
    """What one round's updates amount to.

    Attributes:
        factors: By layer, what the assignment gives, at the layer's full rank; empty where no
            factor comes from the server.
        increment: By layer, what goes into the base, as far as the method's residual allows: what
            `factors` leave out of G', or G' − G where the base is per client.
        head: Averaged head (η applied).
        deviation: By layer, ‖Σ wᵢsᵢBᵢAᵢ − s·B̄Ā‖_F: what plain averaging would miss.
        ideal: By layer, ‖Σ wᵢsᵢBᵢAᵢ‖_F.
    """

    factors: Mapping[str, Factors]
    increment: Increment
    head: Mapping[str, Tensor]
    deviation: Mapping[str, float]
    ideal: Mapping[str, float]


def assign(method: Method, s: Statistics) -> Assigned:
    """What the method's assignment makes of one layer.

    Raises:
        UserError: It gives something else than it states.
    """
    assignment, layer = method.assignment, s.layer
    found = assignment.assign(s)
    told = f"assignment {assignment.name!r}: assign gave"
    if not isinstance(found, Assigned):
        kind = type(found).__name__
        raise UserError(f"{told} a {kind}; expected Assigned(factors, left_out)")
    given = (assignment.shared and not assignment.drawn) or assignment.dealt
    if given and found.factors is None:
        raise UserError(f"{told} no factors, and clients are to get some")
    if found.factors is not None:
        a, b = found.factors.A.shape, found.factors.B.shape
        if (*a, *b) != (layer.rank, layer.inp, layer.out, layer.rank):
            expected = f"{(layer.rank, layer.inp)} and {(layer.out, layer.rank)}"
            raise UserError(f"{told} A and B of shapes {(*a,)} and {(*b,)}; expected {expected}")
    if found.left_out is not None and found.left_out.shape != (layer.out, layer.inp):
        shapes = f"{found.left_out.shape}; expected {(layer.out, layer.inp)}"
        raise UserError(f"{told} a residual of shape {shapes}")
    return found


class Aggregator:
    """Streaming aggregation: `add` each client in sorted order of their names, then `finish`.

    The result depends on nothing else, bit for bit. Aggregates of disjoint clients `combine`, so
    that a tree of servers comes to what one server would (to rounding).

    Args:
        method: Row of the methods table.
        layers: Shapes; the rank is the largest of any client.
        trained: Which factors the clients train this round, of "A" and "B".
        eta: η in G' = G + η·Σ wᵢsᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰), the server's learning rate.
        clients: How many are expected, if known; for them memory is taken once.
        combining: What is in the place of the weighted mean, if another is. A robust one holds all
            clients until `finish`.

    Example:
        >>> import torch
        >>> from fedex_lora.aggregation.methods import METHODS
        >>> layer = LayerShape(out=2, inp=2, rank=1, scale=2.0)
        >>> def state(a, b):
        ...     f = Factors(torch.tensor([[a, 0.0]]), torch.tensor([[b], [0.0]]), 2.0)
        ...     return AdapterState({"q": f})
        >>> agg = Aggregator(METHODS["fedex"], {"q": layer}, frozenset("AB"))
        >>> agg.add(1, state(1.0, 0.0), state(1.0, 1.0))
        >>> agg.add(1, state(1.0, 0.0), state(3.0, 3.0))
        >>> out = agg.finish()
        >>> (out.factors["q"].delta() + out.increment["q"]).dense()[0, 0].item()
        10.0
    """

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, LayerShape],
        trained: frozenset[str],
        eta: float = 1.0,
        clients: int = 2,
        combining: Combining = Combining(),  # noqa: B008 (a value)
    ) -> None:
        self.method, self.eta, self.combining = method, eta, combining
        needs = method.assignment.needs
        seen = method.assignment.sent_up(trained)
        self._measurable = method.shows_products(trained)
        self._layers = {
            name: LayerSums(layer, needs, seen, eta, clients) for name, layer in layers.items()
        }
        self._waiting: list[tuple[float, AdapterState, AdapterState]] = []
        self._head: dict[str, Tensor] = {}
        self._head_start: Mapping[str, Tensor] = {}
        self.weight = 0.0

    def add(self, weight: float, start: AdapterState, end: AdapterState) -> None:
        """Takes in one client: where it started, where it ended, its unnormalised weight n > 0.

        The tensors must stay as they are until `finish`; some are read only then.
        """
        end = aligned(start, end) if self.combining.align else end
        self._waiting.append((weight, start, end))
        if self.combining.robust:
            return
        if len(self._waiting) == _AT_ONCE:
            self._take_waiting()
        self._add_head(weight, start.head, _drift(start, end))

    def _add_head(self, n: float, start: Mapping[str, Tensor], drift: Mapping[str, Tensor]) -> None:
        """The running mean of the head's drifts."""
        self.weight += n
        self._head_start = self._head_start or start
        for name, value in drift.items():
            mean = self._head.get(name)
            step = n / self.weight
            self._head[name] = value if mean is None else mean + step * (value - mean)

    def _take_waiting(self) -> None:
        for name, sums in self._layers.items():
            for n, start, end in self._waiting:
                sums.add(n, start.layers[name], end.layers[name])
        self._waiting = []

    def _take_robustly(self) -> dict[str, Delta]:
        """Takes in one client in the place of all that wait: the one that Krum chose, or one that
        moved by the trimmed means. Returns, by layer, what the latter's product misses."""
        clients, self._waiting = self._waiting, []
        if self.combining.mean == "krum":
            chosen = krum([end for _, _, end in clients], self.combining.liars)
            _, start, end = clients[chosen]
            self._waiting = [(1.0, start, end)]
            self._take_waiting()
            self._add_head(1.0, start.head, _drift(start, end))
            return {}
        cut, missed = self.combining.cut(len(clients)), {}
        for name, sums in self._layers.items():
            starts = [sums.full(start.layers[name]) for _, start, _ in clients]
            ends = [sums.full(end.layers[name]) for _, _, end in clients]
            end, missed[name] = middle(starts, ends, cut)
            sums.add(1.0, starts[0], end)
        drifts = [_drift(start, end) for _, start, end in clients]
        head = {n: trimmed([d[n] for d in drifts], cut) for n in drifts[0]}
        self._add_head(1.0, clients[0][1].head, head)
        return missed if len(clients) > 1 and self.method.residual != "zero" else {}

    def combine(self, other: Aggregator) -> None:
        """Takes in all clients of another aggregator of the same round, which is used up."""
        if self.combining.robust:
            self._waiting += other._waiting
            return
        self._take_waiting()
        other._take_waiting()
        for name, sums in self._layers.items():
            sums.combine(other._layers[name])
        if other.weight:
            self._add_head(other.weight, other._head_start, other._head)

    def finish(self, norms: bool = True) -> Aggregate:
        """The aggregate of all clients added; at least one is needed. To be called once.

        Args:
            norms: Whether to measure `deviation` and `ideal`, which takes longer than the rest.
                They are of products, so not where clients keep a factor that they trained, or
                train what lies between the factors.
        """
        missed = self._take_robustly() if self.combining.robust else {}
        self._take_waiting()
        return concluded(
            self.method,
            self._statistics(missed),
            {n: self._head_start[n] + self.eta * d for n, d in self._head.items()},
            norms and self._measurable,
        )

    def _statistics(self, missed: Mapping[str, Delta]) -> Iterator[tuple[str, Statistics]]:
        for name, sums in self._layers.items():
            found = sums.finish()
            yield name, found.missing(missed[name]) if name in missed else found


def concluded(
    method: Method,
    layers: Iterable[tuple[str, Statistics]],
    head: Mapping[str, Tensor],
    norms: bool = True,
) -> Aggregate:
    """What the method makes of every layer's statistics.

    Args:
        norms: Whether to measure `deviation` and `ideal`.
    """
    factors, increment, measured, head = {}, {}, {}, dict(head)
    for name, statistics in layers:
        if norms:
            measured[name] = statistics.norms()
        gradient = head.pop(weight_name(name), None)
        assigned = assign(method, replace(statistics, gradient=gradient))
        if assigned.inner is not None:
            head[inner_name(name)] = assigned.inner
        if assigned.factors is not None:
            factors[name] = assigned.factors
        if assigned.left_out is not None and method.in_ledger:
            increment[name] = assigned.left_out
    return Aggregate(
        factors,
        increment,
        head,
        {name: deviation for name, (deviation, _) in measured.items()},
        {name: ideal for name, (_, ideal) in measured.items()},
    )


def _drift(start: AdapterState, end: AdapterState) -> dict[str, Tensor]:
    return {n: t - start.head[n] for n, t in end.head.items()}
