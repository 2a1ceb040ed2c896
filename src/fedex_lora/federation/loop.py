"""The round loop. There is one; engines only carry its messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from fedex_lora.adapter import AdapterState
from fedex_lora.aggregate import Aggregate, Aggregator
from fedex_lora.errors import QuorumLost, UpdateRefused
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    broadcast_nbytes,
    check,
    decode_update,
    encode_update,
    ledger_tensors,
)
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, broadcast_to, start_of, step
from fedex_lora.lowrank import LowRank, factored

Record = dict[str, Any]


@dataclass(frozen=True)
class Lost:
    """A client that sent nothing that can be used, or was not there.

    Attributes:
        refused: Whether it did send something.
        resent: As of an `Update`.
    """

    client: str
    reason: str
    refused: bool = False
    resent: int = 0


class Transport(Protocol):
    """Carries one round's messages."""

    def exchange(
        self, state: ServerState, broadcasts: Mapping[str, Broadcast]
    ) -> Iterator[Update | Lost]:
        """Delivers the broadcasts and yields one reply a client, in any order."""
        ...


@dataclass
class _Tally:
    """What happened in a round, besides the numbers that are aggregated."""

    taken: dict[str, Update] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    ends: dict[str, AdapterState] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


KeepUpdate = Callable[[int, Update, AdapterState], None]
Shelve = Callable[[int, AdapterState], AdapterState]


def run_round(
    state: ServerState,
    settings: Settings,
    transport: Transport,
    keep: KeepUpdate | None = None,
    shelve: Shelve = lambda version, adapter: adapter,
) -> tuple[ServerState, Record]:
    """One round: broadcast, collect, check, aggregate.

    Args:
        keep: Called with (round, update, end state) for every update taken.
        shelve: Given (version, a client's own factors), puts them where they need no memory.

    Returns:
        The next state and the round's record (without scores, which need a model).

    Raises:
        QuorumLost: Fewer than `min_clients` valid updates; `state` still stands.
    """
    round = state.version + 1
    names = settings.sample(round)
    broadcasts = {name: broadcast_to(state, settings, name) for name in names}
    down = count_down(settings, broadcasts)
    tally = _Tally()
    aggregator = Aggregator(
        settings.method,
        settings.sites,
        settings.method.trained(round),
        settings.server_learning_rate,
        len(names),
    )
    for reply in in_order(names, transport.exchange(state, broadcasts)):
        down[reply.client] += reply.resent
        if isinstance(reply, Lost):
            (tally.refused if reply.refused else tally.lost)[reply.client] = reply.reason
        else:
            _take(reply, state, settings, aggregator, tally, keep, shelve)
    _check_quorum(tally, settings, round)
    began = perf_counter()
    result = aggregator.finish() if settings.method.exchanges else None
    after = step(state, settings, result, sorted(tally.taken), tally.ends)
    tally.seconds += perf_counter() - began
    return after, _record(round, settings, after, result, tally, down)


def in_order(names: Sequence[str], replies: Iterable[Update | Lost]) -> Iterator[Update | Lost]:
    """The replies in the order of `names`, each as soon as all before it are there.

    Sums depend on their order in the last bits; so results do not depend on who is faster. A reply
    of somebody not asked, or a second one, is dropped.

    Example:
        >>> [r.client for r in in_order("abc", [Lost("b", ""), Lost("a", ""), Lost("c", "")])]
        ['a', 'b', 'c']
    """
    waiting: dict[str, Update | Lost] = {}
    left = list(names)
    for reply in replies:
        if reply.client in left:
            waiting.setdefault(reply.client, reply)
        while left and left[0] in waiting:
            yield waiting.pop(left.pop(0))
    yield from (waiting[name] for name in left if name in waiting)


def _take(
    update: Update,
    state: ServerState,
    settings: Settings,
    aggregator: Aggregator,
    tally: _Tally,
    keep: KeepUpdate | None,
    shelve: Shelve,
) -> None:
    client = update.client
    start = start_of(state, settings, client)
    trained = settings.method.trained(state.version + 1)
    try:
        end = check(update, start, trained, state.version + 1, client, settings.max_norm)
    except UpdateRefused as refusal:
        tally.refused[client] = str(refusal)
        return
    began = perf_counter()
    weight = 1.0 if settings.weights == "uniform" else float(update.examples)
    if settings.method.exchanges:
        tally.up[client] = update.nbytes or 0
        if update.nbytes is None:
            blob = encode_update(update, start, settings.wire_dtype)
            tally.up[client] = len(blob)
            if settings.wire_dtype != torch.float32:  # what the server decodes is what counts
                end = check(decode_update(blob, start), start, trained, state.version + 1, client)
        aggregator.add(weight, start, end)
    if settings.method.assignment == "keep":
        kept = AdapterState(end.sites) if settings.method.exchanges else end
        tally.ends[client] = shelve(state.version + 1, kept)
    tally.seconds += perf_counter() - began
    tally.taken[client] = Update(
        update.round, client, {}, {}, {}, update.examples, update.metrics, update.scores
    )
    if keep is not None:
        keep(state.version + 1, update, end)


def _check_quorum(tally: _Tally, settings: Settings, round: int) -> None:
    if len(tally.taken) >= settings.min_clients:
        return
    reasons = [f"{c}: {why}" for c, why in {**tally.lost, **tally.refused}.items()]
    raise QuorumLost(
        f"round {round}: {len(tally.taken)} valid updates, federation.min_clients is "
        f"{settings.min_clients}. " + "; ".join(reasons)
    )


def count_down(settings: Settings, broadcasts: Mapping[str, Broadcast]) -> dict[str, int]:
    """Bytes of each client's message; those of the same tensors are counted once."""
    if not settings.method.exchanges:
        return dict.fromkeys(broadcasts, 0)
    sizes: dict[object, int] = {}
    down = {}
    for client, message in broadcasts.items():
        key = _identity(message)
        if key not in sizes:
            sizes[key] = broadcast_nbytes(message, settings.wire_dtype)
        down[client] = sizes[key]
    return down


def _identity(message: Broadcast) -> object:
    parts = [message.A, message.B, message.head, ledger_tensors(message.ledger)]
    return message.fresh, tuple((n, id(t)) for part in parts for n, t in part.items())


def _record(
    round: int,
    settings: Settings,
    after: ServerState,
    result: Aggregate | None,
    tally: _Tally,
    down: Mapping[str, int],
) -> Record:
    record: Record = {
        "round": round,
        "clients": {
            c: {
                "examples": u.examples,
                **u.metrics,
                **({"scores": dict(u.scores)} if u.scores else {}),
            }
            for c, u in tally.taken.items()
        },
        "refused": tally.refused,
        "lost": tally.lost,
        "weights": _weights(list(tally.taken.values()), settings),
        "bytes_down": dict(down),
        "bytes_up": tally.up,
        "seconds": {"aggregate": tally.seconds},
    }
    if result is not None and result.deviation:
        record["deviation"] = _mean(result.deviation)
        record["ideal"] = _mean(result.ideal)
        record["deviation_by_site"] = dict(result.deviation)
        record["ideal_by_site"] = dict(result.ideal)
    if after.carry:
        record["carry"] = _norms(after.carry)
        record["sent"] = _norms(after.ledger.since(round - 1).entries[-1][1])
    if result is not None and settings.method.residual == "truncated":
        record["left_out"] = _left_out(round, settings, after, result)
    return record


def _left_out(round: int, settings: Settings, after: ServerState, result: Aggregate) -> float:
    """‖·‖_F of what truncation keeps from the clients: all that is carried, or what is lost now."""
    if settings.carry:
        return _norms(after.carry)
    if not result.increment:  # of one client
        return 0.0
    sent = dict(after.ledger.since(round - 1).entries[-1][1])
    lost = {s: factored(w).distance(factored(sent[s])) for s, w in result.increment.items()}
    return sum(d.item() ** 2 for d in lost.values()) ** 0.5


def _weights(updates: Sequence[Update], settings: Settings) -> dict[str, float]:
    n = {u.client: 1.0 if settings.weights == "uniform" else float(u.examples) for u in updates}
    return {c: v / sum(n.values()) for c, v in n.items()}


def _norms(by_site: Mapping[str, LowRank | Tensor]) -> float:
    squares = [w.norm().item() ** 2 for w in by_site.values()]
    return sum(squares) ** 0.5


def _mean(by_site: Mapping[str, float]) -> float:
    return sum(by_site.values()) / len(by_site)
