"""The round loop. There is one; engines only carry its messages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.aggregator import Aggregate, Aggregator
from fedex_lora.aggregation.lowrank import LowRank, factored
from fedex_lora.errors import QuorumLost, UpdateRefused
from fedex_lora.federation.checks import check, ended, outliers, too_large
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    broadcast_nbytes,
    decode_update,
    encode_update,
    ledger_tensors,
    update_nbytes,
)
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.spool import Spool
from fedex_lora.federation.state import ServerState, broadcast_to, start_of, step

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


@dataclass(frozen=True)
class _Taken:
    """What the record says of an update that was aggregated."""

    examples: int
    metrics: Mapping[str, float]
    scores: Mapping[str, float]


@dataclass
class _Tally:
    """What happened in a round, besides the numbers that are aggregated."""

    taken: dict[str, _Taken] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def refuse(self, client: str, why: str) -> None:
        self.taken.pop(client, None)
        self.refused[client] = why


KeepUpdate = Callable[[int, Update, AdapterState], None]
Shelve = Callable[[int, AdapterState], AdapterState]


def run_round(
    state: ServerState,
    settings: Settings,
    transport: Transport,
    keep: KeepUpdate | None = None,
    shelve: Shelve = lambda version, adapter: adapter,
    waiting: Path | None = None,
) -> tuple[ServerState, Record]:
    """One round: broadcast, collect, check, aggregate.

    Args:
        keep: Called with (round, update, end state) for every update taken.
        shelve: Given (version, a client's own factors), puts them where they need no memory.
        waiting: A folder for updates that wait for the others; None keeps them in memory.

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
    with Spool(waiting) as spool:
        for reply in _each_once(names, transport.exchange(state, broadcasts), tally):
            down[reply.client] += reply.resent
            if isinstance(reply, Lost):
                (tally.refused if reply.refused else tally.lost)[reply.client] = reply.reason
            else:
                _receive(reply, state, settings, tally, spool)
        if settings.method.exchanges:
            for client, why in outliers(tally.norms, settings.norm_ratio).items():
                tally.refuse(client, why)
        began = perf_counter()
        after, result = _next_state(state, settings, tally, spool, shelve)
        tally.seconds += perf_counter() - began
        if keep is not None:
            for client in sorted(tally.taken):
                update = spool.get(client)
                keep(round, update, ended(start_of(state, settings, client), update))
    return after, _record(round, settings, after, result, tally, down)


def _each_once(
    names: Iterable[str], replies: Iterable[Update | Lost], tally: _Tally
) -> Iterator[Update | Lost]:
    """The replies of those who were asked, each once; who else sends something is named."""
    left = set(names)
    for reply in replies:
        if reply.client in left:
            left.remove(reply.client)
            yield reply
        else:
            tally.refused.setdefault(reply.client, "sent something that was not asked for")


def _receive(
    update: Update, state: ServerState, settings: Settings, tally: _Tally, spool: Spool
) -> None:
    """Checks an update by itself and puts it aside until the others are there."""
    client, round = update.client, state.version + 1
    start, trained = start_of(state, settings, client), settings.method.trained(round)
    began = perf_counter()
    try:
        tally.norms[client] = check(update, start, trained, round, settings)
        if settings.method.exchanges:
            tally.up[client] = update.nbytes or update_nbytes(update, settings.wire_dtype)
            if update.nbytes is None and settings.wire_dtype != torch.float32:
                # it crossed no wire; what the server would have decoded is what counts
                blob = encode_update(update, start, settings.wire_dtype)
                update = decode_update(blob, start, client)
                tally.norms[client] = check(update, start, trained, round, settings)
    except UpdateRefused as refusal:
        tally.refused[client] = str(refusal)
        return
    spool.put(update)
    tally.taken[client] = _Taken(update.examples, update.metrics, update.scores)
    tally.seconds += perf_counter() - began


def _next_state(
    state: ServerState, settings: Settings, tally: _Tally, spool: Spool, shelve: Shelve
) -> tuple[ServerState, Aggregate | None]:
    """The state that the updates lead to, in sorted order of the clients: sums depend on their
    order in the last bits, so results do not depend on who is faster.

    An update that would make the state one that nobody can train from is left out and named.
    """
    while True:
        _check_quorum(tally, settings, state.version + 1)
        try:
            after, result = _aggregated(state, settings, sorted(tally.taken), spool, shelve)
            if (broken := too_large(after)) is None:
                return after, result
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            broken = str(error)
        largest = max(tally.taken, key=lambda client: tally.norms[client])
        tally.refuse(
            largest,
            f"it changed by {tally.norms[largest]:.4g}, and the aggregate would be beyond what can "
            f"be trained from ({broken})",
        )


def _aggregated(
    state: ServerState, settings: Settings, clients: list[str], spool: Spool, shelve: Shelve
) -> tuple[ServerState, Aggregate | None]:
    method, round = settings.method, state.version + 1
    aggregator = Aggregator(
        method,
        settings.sites,
        method.trained(round),
        settings.server_learning_rate,
        len(clients),
    )
    ends: dict[str, AdapterState] = {}
    for client in clients:
        start = start_of(state, settings, client)
        update = spool.get(client)
        end = ended(start, update)
        if method.exchanges:
            weight = 1.0 if settings.weights == "uniform" else float(update.examples)
            aggregator.add(weight, start, end)
        if method.assignment == "keep":
            kept = AdapterState(end.sites) if method.exchanges else end
            ends[client] = shelve(round, kept)
    result = aggregator.finish() if method.exchanges else None
    return step(state, settings, result, clients, ends), result


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
            for c, u in sorted(tally.taken.items())
        },
        "refused": tally.refused,
        "lost": tally.lost,
        "weights": _weights(tally.taken, settings),
        "norms": {c: tally.norms[c] for c in sorted(tally.norms)},
        "bytes_down": dict(down),
        "bytes_up": tally.up,
        "seconds": {"aggregate": tally.seconds},
    }
    if tally.norms:
        record["median_norm"] = statistics.median(tally.norms.values())
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


def _weights(taken: Mapping[str, _Taken], settings: Settings) -> dict[str, float]:
    uniform = settings.weights == "uniform"
    n = {c: 1.0 if uniform else float(taken[c].examples) for c in sorted(taken)}
    return {c: v / sum(n.values()) for c, v in n.items()}


def _norms(by_site: Mapping[str, LowRank | Tensor]) -> float:
    squares = [w.norm().item() ** 2 for w in by_site.values()]
    return sum(squares) ** 0.5


def _mean(by_site: Mapping[str, float]) -> float:
    return sum(by_site.values()) / len(by_site)
