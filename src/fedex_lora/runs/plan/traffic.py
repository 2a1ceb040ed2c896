"""The size of every message of a federation, before it runs and without a model: from shapes.

The server's own `broadcast_to` and `step` are called with tensors on the meta device, which have
shapes and no numbers. What an assignment leaves out, and so what goes down, is asked of the
assignment. Every client is taken to deliver in every round it is sampled for. What a lossy wire
dtype rounds off, and is carried, is taken to have the largest rank that it can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.aggregator import Aggregate, assign
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.statistics import End, Statistics
from fedex_lora.federation.codec import broadcast_nbytes, ledger_tensors, update_nbytes
from fedex_lora.federation.messages import Tensors, Update, flat
from fedex_lora.federation.secure import sums
from fedex_lora.federation.secure.sums import is_dense
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import (
    ServerState,
    begin,
    broadcast_to,
    delivered,
    own_part,
    sent_part,
    start_of,
    step,
)
from fedex_lora.runs.plan import secure as planned

Shapes = Mapping[str, torch.Size]

_METRICS = {"loss": 1.0, "steps": 1.0, "seconds": 1.0}


@dataclass(frozen=True)
class Size:
    """How large messages are.

    Attributes:
        numbers: Entries of their tensors.
        bytes: Everything, with headers.
    """

    numbers: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.numbers + other.numbers, self.bytes + other.bytes)


def summed(sizes: Iterable[Size]) -> Size:
    """The sizes' sum.

    Example:
        >>> summed([Size(1, 4), Size(2, 8)])
        Size(numbers=3, bytes=12)
    """
    return sum(sizes, Size())


class DryRun:
    """A federation without a model; `round` plays one round.

    Args:
        settings: The federation's.
        head: Shapes of what is trained in full; all parameters where there are no layers.
        started: Whether B is not zero in the beginning: an adapter to start from.

    Example:
        >>> from fedex_lora.aggregation.methods import METHODS
        >>> layers = {"q": LayerShape(out=64, inp=48, rank=2, scale=1.0)}
        >>> run = DryRun(Settings(METHODS["fedex"], 0, ("a", "b", "c"), layers, rounds=2), {})
        >>> up, down = run.round()
        >>> up["a"].numbers, down["a"].numbers      # A and B; all have the start already
        (224, 0)
        >>> run.down("a").numbers                   # A, B and a residual of rank (3 − 1)·2
        672
    """

    def __init__(self, settings: Settings, head: Shapes, started: bool = False) -> None:
        self.settings, self._started = settings, started
        # one number, seen as many: whether B is zero is asked for
        b = torch.full((1, 1), float(started))
        initial = AdapterState(
            {
                n: Factors(_empty(s.rank, s.inp), b.expand(s.out, s.rank), s.scale)
                for n, s in settings.layers.items()
            },
            {name: _empty(*shape) for name, shape in head.items()},
        )
        self._state = _without_numbers(begin(settings, initial))
        self._sizes: dict[object, Size] = {}

    @property
    def version(self) -> int:
        """Rounds played."""
        return self._state.version

    def round(self) -> tuple[dict[str, Size], dict[str, Size]]:
        """Plays the next round; sizes of the messages up and down, by client."""
        asked = self.settings.sample(self.version + 1)
        down = {client: self.down(client) for client in asked}
        taken = asked[: self.settings.sample_size]  # the others come too late
        up = {client: self._up(client) for client in taken}
        if self.settings.secure is not None:
            up, down = self._summed(asked, down)
        result = self._aggregate(taken) if self.settings.method.exchanges else None
        kept = {client: self._kept(client) for client in taken} if self._keeps else {}
        self._state = self._in_wire_dtype(step(self._state, self.settings, result, taken, kept))
        self._sizes.clear()
        return up, down

    def scored(self) -> dict[str, Size]:
        """Sizes of the messages with which clients get the model to score it: those of the next
        round, who have it then, or all of them after the last."""
        settings, next = self.settings, self.version + 1
        asked = settings.clients if next > settings.rounds else settings.sample(next)
        down = {client: self.down(client) for client in asked}
        self._state = delivered(self._state, asked)
        self._sizes.clear()
        return down

    def down(self, client: str) -> Size:
        """The message that brings this client up to date."""
        state = self._state
        own = state.changed.get(f"own/{client}")
        return self._down(state, client, self.settings.ranks.get(client), own)

    def catch_up(self) -> Size:
        """The message for a client that joins now: it holds the start and nothing since."""
        changed = {k: v for k, v in self._state.changed.items() if not k.startswith("own/")}
        joined = replace(self._state, held={}, changed=changed)
        return self._down(joined, self.settings.clients[0], "joins")

    def own_factors(self) -> int:
        """Bytes of what is each client's, own factors and variates, which lies on disk."""
        own, clients = self._state.own.values(), self.settings.clients
        variates = _numbers(self._variates) * len(clients)
        return 4 * (sum(map(_numbers, own)) + variates)

    @property
    def _variates(self) -> Tensors:
        return start_of(self._state, self.settings, self.settings.clients[0]).variates

    def checkpoint(self) -> int:
        """Bytes of the state's tensors, all float32, clients' own factors apart."""
        state = self._state
        asynchronous = self.settings.asynchronous
        versions = 1 + (0 if asynchronous is None else asynchronous.staleness)
        shared = _numbers(flat(AdapterState(state.factors, state.head)))
        numbers = versions * shared + _numbers(state.late)
        numbers += _numbers(state.optimizer) + _numbers(self._variates)
        return self.ledger_bytes() + 4 * (numbers + sum(w.numbers for w in state.carry.values()))

    def ledger_bytes(self) -> int:
        """Bytes of the ledger's tensors as float32."""
        return 4 * _numbers(ledger_tensors(self._state.ledger))

    def ledger_ranks(self) -> dict[str, int]:
        """By layer, the rank of T as the ledger holds it; min(out, in) where it is dense."""
        ranks = dict.fromkeys(self.settings.layers, 0)
        ledger = self._state.ledger
        for increment in (ledger.snapshot, *(inc for _, inc in ledger.entries)):
            for name, w in increment.items():
                ranks[name] = min(ranks[name] + w.rank, *w.shape)
        return ranks

    def _down(self, state: ServerState, client: str, *like: object) -> Size:
        """Of the message to this client; clients of one version and `like` are sent as much."""
        key = (state.held.get(client), *like)
        if not self.settings.method.exchanges:
            return Size()
        if key not in self._sizes:
            message = broadcast_to(state, self.settings, client)
            numbers = _numbers(message.tensors) + _numbers(ledger_tensors(message.ledger))
            bytes = broadcast_nbytes(message, self.settings.wire_dtype)
            self._sizes[key] = Size(numbers, bytes)
        return self._sizes[key]

    def _up(self, client: str) -> Size:
        if not self.settings.method.exchanges:
            return Size()
        key = ("up", self.settings.ranks.get(client))
        if key not in self._sizes:
            round = self.version + 1
            tensors = flat(start_of(self._state, self.settings, client))
            tensors = sent_part(self.settings, tensors, round)
            update = Update(round, client, tensors, 1, _METRICS)
            bytes = update_nbytes(update, self.settings.wire_dtype)
            self._sizes[key] = Size(_numbers(tensors), bytes)
        return self._sizes[key]

    def _begun(self, clients: Sequence[str]) -> bool:
        """Whether what they add under secure aggregation has a term of what they started from."""
        own = self.settings.method.assignment.own and self.version > 0
        return bool(own) or any(map(self._has_begun, clients))

    def _summed(
        self, asked: Sequence[str], down: Mapping[str, Size]
    ) -> tuple[dict[str, Size], dict[str, Size]]:
        """Messages up and down where the server sees sums alone."""
        args = (self.settings, self.version + 1, asked, self._begun(asked), self._state.head)
        sent, told = planned.extra(*args)
        up = Size(planned.numbers(*args), sent)
        return dict.fromkeys(asked, up), {c: s + Size(0, told) for c, s in down.items()}

    @property
    def _keeps(self) -> bool:
        """Whether clients go on from factors that they trained themselves."""
        assignment = self.settings.method.assignment
        return bool(assignment.own) and not assignment.dealt

    def _kept(self, client: str) -> Tensors:
        return own_part(self.settings, flat(start_of(self._state, self.settings, client)))

    def _aggregate(self, taken: Sequence[str]) -> Aggregate:
        """What the aggregator would come to, in shapes."""
        method = self.settings.method
        factors, increment = {}, {}
        taken = taken[:1] if self.settings.combining.mean == "krum" else taken
        began = sum(map(self._has_begun, taken))
        widths = {}
        if self.settings.secure is not None:
            widths = sums.widths(self.settings, self.version + 1, taken, self._begun(taken))
        for name, layer in self.settings.layers.items():
            dense = name in widths and is_dense(layer, widths[name])
            shapes = statistics(self.settings, layer, self.version + 1, len(taken), began, dense)
            assigned = assign(method, shapes)
            if assigned.factors is not None:
                factors[name] = assigned.factors
            if assigned.left_out is not None and method.in_ledger:
                increment[name] = assigned.left_out
        head = {name: _empty(*t.shape) for name, t in self._state.head.items()}
        return Aggregate(factors, increment, head, {}, {})

    def _has_begun(self, client: str) -> bool:
        """Whether a client starts from B ≠ 0."""
        assignment, version = self.settings.method.assignment, self.version
        if assignment.drawn:
            return self._started and not version
        trained = client in self._state.taken if assignment.own else version > 0
        return self._started or trained

    def _in_wire_dtype(self, state: ServerState) -> ServerState:
        """The newest tensors in the dtype in which they are sent; drawn ones lose their numbers."""
        settings, version = self.settings, state.version
        if version == settings.rounds and settings.flush:
            return state
        to = settings.wire_dtype
        factors = {
            n: Factors(f.A.to("meta", to), f.B.to("meta", to), f.scale)
            for n, f in state.factors.items()
        }
        entries = tuple(
            (v, {n: w.to(to) for n, w in inc.items()} if v == version else inc)
            for v, inc in state.ledger.entries
        )
        return replace(
            state,
            factors=factors,
            head={name: t.to(to) for name, t in state.head.items()},
            ledger=Ledger(entries, state.ledger.snapshot, state.ledger.snapshot_version),
            own={c: {name: t.to(to) for name, t in own.items()} for c, own in state.own.items()},
        )


def statistics(
    settings: Settings,
    layer: LayerShape,
    round: int,
    clients: int,
    began: int = 0,
    summed: bool = False,
) -> Statistics:
    """What the updates of so many clients amount to in one layer: shapes without numbers.

    Args:
        began: How many of them start from B ≠ 0, whose B⁰A⁰ is a term of its own.
        summed: Whether it is the products themselves that are summed, under secure aggregation.
    """
    assignment, k = settings.method.assignment, clients
    both = assignment.sent_up(settings.method.trained(round)) == {"A", "B"}
    combining = settings.combining
    exact = settings.method.residual != "zero" and k > 1
    whole = combining.by_coordinate or summed
    dense = Delta(_empty(layer.out, layer.inp)) if whole and exact else None
    k = 1 if combining.by_coordinate else k

    def terms(count: int) -> Delta:
        if dense is not None:
            return dense
        rank = count * layer.rank
        return Delta(_empty(layer.out, rank), _empty(rank, layer.inp)).smaller()

    mean = Factors(_empty(layer.rank, layer.inp), _empty(layer.out, layer.rank), layer.scale)
    eta = settings.server_learning_rate
    return _Statistics(
        layer,
        eta,
        both,
        mean,
        mean,
        dense or (terms(k - 1) if both and k > 1 else None),
        terms(k if eta == 1 else k + began) if "product" in assignment.needs else None,
        terms(k + began) if "increment" in assignment.needs else None,
        (End(1 / k, mean, mean),) * k if "ends" in assignment.needs else (),
    )


@dataclass(frozen=True)
class _Statistics(Statistics):
    """Without numbers."""

    def split_product(self) -> tuple[Factors, Delta]:
        assert self.product is not None
        return self.mean, self.product.split(self.layer.rank)[1]


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _numbers(tensors: Tensors) -> int:
    return sum(t.numel() for t in tensors.values())


def _without_numbers(state: ServerState) -> ServerState:
    """The state before round 1 on the meta device."""
    snapshot = {
        name: Delta(*(part.to("meta") for part in w.parts.values()))
        for name, w in state.ledger.snapshot.items()
    }
    return replace(
        state,
        factors={
            n: Factors(f.A.to("meta"), f.B.to("meta"), f.scale) for n, f in state.factors.items()
        },
        head={n: t.to("meta") for n, t in state.head.items()},
        ledger=Ledger((), snapshot, 0),
        own={c: {n: t.to("meta") for n, t in own.items()} for c, own in state.own.items()},
    )
