"""The round loop. There is one; transports only carry its messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.aggregator import Aggregate, Aggregator
from fedex_lora.aggregation.combining import Combining
from fedex_lora.errors import QuorumLost, UpdateRefused, UserError
from fedex_lora.federation.checks import check, outliers, too_large, variate_norm
from fedex_lora.federation.codec import (
    broadcast_nbytes,
    decode_update,
    encode_update,
    update_nbytes,
)
from fedex_lora.federation.late import Late, delays, earlier_start, remembered, with_late
from fedex_lora.federation.messages import (
    Broadcast,
    Lost,
    Pending,
    Scores,
    Tensors,
    Update,
    flat,
    replaced,
    variates_in,
)
from fedex_lora.federation.noise import MeanNoise
from fedex_lora.federation.record import Record, Taken, Tally, record_of
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.spool import Spool
from fedex_lora.federation.state import (
    ServerState,
    broadcast_to,
    delivered,
    own_part,
    start_of,
    step,
)
from fedex_lora.federation.variates import replaced_by


class Exchange:
    """One exchange of messages, as the server sees it: who is asked, and what each is sent.

    Attributes:
        state: The server's, before the round.
        clients: Who is asked, sorted.
        scored: Whether, where nothing is trained, scores are asked for.
        final: Whether no round follows: the model is delivered, to be kept.
        attempt: How often the round was given up before.
    """

    def __init__(
        self,
        state: ServerState,
        settings: Settings,
        clients: Sequence[str],
        scored: bool = True,
        final: bool = False,
        attempt: int = 0,
    ) -> None:
        self.state, self.settings, self.clients = state, settings, clients
        self.scored, self.final, self.attempt = scored, final, attempt
        self._starts: dict[object, AdapterState] = {}  # by rank

    @property
    def round(self) -> int:
        """The round that is trained, or would be next."""
        return self.state.version + 1

    def rank(self, client: str) -> tuple[int | None, int | None]:
        """What clients' shapes depend on: the rank that the recipe gives it, and what is left."""
        return self.settings.ranks.get(client), self.state.ranks.get(client)

    def message(self, client: str, held: int | None = None) -> Broadcast:
        """What a client is sent; `held` is the version that it holds, if it says another one."""
        return broadcast_to(self.state, self.settings, client, held)

    def start(self, client: str) -> AdapterState:
        """Where the client starts from, as far as a server knows: private factors of clients in
        this process are not looked at. What is a client's own is not kept in memory for all."""
        method = self.settings.method
        unseen = method.assignment.private and method.exchanges
        if self.settings.scaffold or (client in self.state.own and not unseen):
            return start_of(self.state, self.settings, client)
        rank = self.rank(client)
        if rank not in self._starts:
            self._starts[rank] = start_of(self.state, self.settings, client)
        return self._starts[rank]


class Transport(Protocol):
    """Carries messages; one reply a client, in any order."""

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        """Delivers the broadcasts and brings back what clients trained."""
        ...

    def evaluate(self, exchange: Exchange) -> Iterator[Scores | Lost]:
        """Delivers the broadcasts and brings back how good clients find that model."""
        ...


KeepUpdate = Callable[[int, Update, AdapterState], None]
Shelve = Callable[[int, Tensors], Tensors]


def run_round(
    state: ServerState,
    settings: Settings,
    transport: Transport,
    keep: KeepUpdate | None = None,
    shelve: Shelve = lambda version, tensors: tensors,
    waiting: Path | None = None,
    noise: MeanNoise | None = None,
) -> tuple[ServerState, Record]:
    """One round: broadcast, collect, check, aggregate.

    Args:
        keep: Called with (round, update, end state) for every update taken.
        shelve: Given (version, a client's own tensors), puts them where they need no memory.
        waiting: A folder for updates that wait for the others; None keeps them in memory.
        noise: On their mean, for methods of which all that is published follows from that.

    Returns:
        The next state and the round's record (without scores, which need a model).

    Raises:
        QuorumLost: Fewer than `min_clients` valid updates; `state` still stands.
        UserError: Noise, and another mean than the weighted one.
    """
    if noise is not None and settings.combining != Combining():
        raise UserError("mean, align: the noise is on the weighted mean alone; leave them out")
    clients = settings.sample(state.version + 1, busy=state.pending)
    exchange = Exchange(state, settings, clients)
    down = count_down(exchange)
    tally, pending = Tally(), dict(state.pending)
    with Spool(waiting) as spool:
        for client in [c for c, p in state.pending.items() if p.due <= exchange.round]:
            _receive_late(pending.pop(client).update, exchange, tally)
        replies = _punctual(transport.train(exchange), exchange, tally)
        for reply in each_once(exchange.clients, replies, tally.refused):
            down[reply.client] += reply.resent
            if isinstance(reply, Lost):
                (tally.refused if reply.refused else tally.lost)[reply.client] = reply.reason
            else:
                _receive(reply, exchange, tally, spool)
        if settings.method.exchanges:
            ratio, told = settings.norm_ratio, "its control variates have a norm of"
            found = outliers(tally.variate_norms, ratio, told)
            for client, why in {**found, **outliers(tally.all_norms, ratio)}.items():
                tally.refuse(client, why)
        for client, rounds in delays(state, settings, sorted(tally.taken)).items():
            held, due = spool.get(client), exchange.round + rounds
            tensors = shelve(exchange.round, held.tensors)
            pending[client] = Pending(replace(held, tensors=tensors), due)
            tally.delayed[client] = due
            del tally.taken[client]
        began = perf_counter()
        after, result = _next_state(exchange, tally, spool, shelve, noise)
        after = replace(remembered(state, after, settings), pending=pending)
        tally.seconds += perf_counter() - began
        if keep is not None:
            for client in sorted(tally.taken):
                update = spool.get(client)
                keep(exchange.round, update, replaced(_end(exchange, update), update.kept))
    return after, record_of(settings, after, result, tally, down)


def deliver(
    state: ServerState,
    settings: Settings,
    transport: Transport,
    clients: Sequence[str],
    *,
    scored: bool = True,
    final: bool = False,
) -> tuple[ServerState, dict[str, Mapping[str, float]], dict[str, int], dict[str, str]]:
    """Sends the model after a round, and asks clients how good they find it.

    Args:
        clients: Who is asked; one that takes no part in rounds may have rows to score on too.
        scored: Whether scores are asked for.
        final: Whether this is the run's last model, to be kept.

    Returns:
        The state, with who holds that model; scores by client; bytes of the messages that arrived;
        and why one did not.
    """
    exchange = Exchange(state, settings, sorted(clients), scored, final)
    down = count_down(exchange)
    told: dict[str, Mapping[str, float]] = {}
    missed: dict[str, str] = {}
    for reply in each_once(exchange.clients, transport.evaluate(exchange), missed):
        down[reply.client] += reply.resent
        if isinstance(reply, Lost):
            missed[reply.client] = reply.reason
        else:
            told[reply.client] = reply.scores
    sent = {c: down[c] for c in sorted(told) if c in settings.clients}
    scores = {c: told[c] for c in sorted(told) if told[c]}
    return delivered(state, sent), scores, sent, missed


def each_once(
    names: Iterable[str], replies: Iterable[Any], refused: dict[str, str]
) -> Iterator[Any]:
    """The replies of those who were asked, each once; who else sends something is named."""
    left = set(names)
    for reply in replies:
        if reply.client in left:
            left.remove(reply.client)
            yield reply
        else:
            refused.setdefault(reply.client, "sent something that was not asked for")


def _punctual(
    replies: Iterable[Update | Lost], exchange: Exchange, tally: Tally
) -> Iterator[Update | Lost]:
    """The replies to this round's messages; updates of earlier rounds are put aside."""
    takes_late = exchange.settings.asynchronous is not None
    for reply in replies:
        if takes_late and isinstance(reply, Update) and reply.round < exchange.round:
            tally.up[reply.client] = tally.up.get(reply.client, 0) + (reply.nbytes or 0)
            _receive_late(reply, exchange, tally)
        else:
            yield reply


def _receive_late(update: Update, exchange: Exchange, tally: Tally) -> None:
    """Checks an update of an earlier round by where that started."""
    settings, label = exchange.settings, f"{update.client}, round {update.round}"
    start = earlier_start(exchange.state, settings, update.client, update.round)
    try:
        if start is None:
            raise UpdateRefused("it comes too late (federation.asynchronous.staleness)")
        norm = check(update, start, update.round, settings)
        tally.late[label] = Late(update, start, norm)
    except UpdateRefused as refusal:
        tally.refused[label] = str(refusal)


def _receive(update: Update, exchange: Exchange, tally: Tally, spool: Spool) -> None:
    """Checks an update by itself and puts it aside until the others are there."""
    client, settings = update.client, exchange.settings
    start, began = exchange.start(client), perf_counter()
    try:
        tally.norms[client] = check(update, start, exchange.round, settings)
        if settings.method.exchanges:
            size = update.nbytes or update_nbytes(update, settings.wire_dtype)
            tally.up[client] = tally.up.get(client, 0) + size
            if update.nbytes is None and settings.wire_dtype != torch.float32:
                # it crossed no wire; what the server would have decoded is what counts
                blob = encode_update(update, start, settings.wire_dtype)
                update = replace(decode_update(blob, start, client), kept=update.kept)
                tally.norms[client] = check(update, start, exchange.round, settings)
    except UpdateRefused as refusal:
        tally.refused[client] = str(refusal)
        return
    spool.put(update)
    if settings.scaffold:
        tally.variate_norms[client] = variate_norm(update)
    tally.taken[client] = Taken(update.examples, update.metrics)
    tally.seconds += perf_counter() - began


def _end(exchange: Exchange, update: Update) -> AdapterState:
    """Where a client ended; what was frozen, and what it did not send, as it was."""
    return replaced(exchange.start(update.client), update.tensors)


def _next_state(
    exchange: Exchange, tally: Tally, spool: Spool, shelve: Shelve, noise: MeanNoise | None
) -> tuple[ServerState, Aggregate | None]:
    """The state that the updates lead to, in sorted order of the clients: sums depend on their
    order in the last bits, so results do not depend on who is faster.

    An update that would make the state one that nobody can train from is left out and named.
    """
    while True:
        if len(tally.taken) < (least := exchange.settings.min_clients):
            reasons = [f"{c}: {why}" for c, why in {**tally.lost, **tally.refused}.items()]
            raise QuorumLost(
                f"round {exchange.round}: {len(tally.taken)} valid updates, "
                f"federation.min_clients is {least}. " + "; ".join(reasons)
            )
        try:
            after, result = _aggregated(exchange, tally, spool, shelve, noise)
            if (broken := too_large(after)) is None:
                return after, result
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            broken = str(error)
        norms = tally.all_norms
        largest = max([*tally.taken, *tally.late], key=lambda client: norms[client])
        tally.refuse(
            largest,
            f"it changed by {norms[largest]:.4g}, and the aggregate would be beyond what can "
            f"be trained from ({broken})",
        )


def _aggregated(
    exchange: Exchange,
    tally: Tally,
    spool: Spool,
    shelve: Shelve,
    noise: MeanNoise | None,
) -> tuple[ServerState, Aggregate | None]:
    settings, method = exchange.settings, exchange.settings.method
    clients, eta = sorted(tally.taken), settings.server_learning_rate
    shares = tally.shares(settings, exchange.round)
    punctual = sum(shares[c] for c in clients) if tally.late else 1.0
    aggregator = Aggregator(
        method,
        settings.layers,
        method.trained(exchange.round),
        eta * punctual,
        len(clients),
        settings.combining,
    )
    kept: dict[str, Tensors] = {}
    pruning, ranks = method.assignment.pruning, dict(exchange.state.ranks)
    total, variates = exchange.state.variate, dict(exchange.state.variates)
    for client in clients:
        update = spool.get(client)
        if noise is not None:
            began, first = flat(exchange.start(client)), client == clients[0]
            shared = noise.share(update.tensors, began, len(clients), first)
            update = replace(update, tensors=shared)
        start, end = exchange.start(client), _end(exchange, update)
        if pruning is not None and pruning.prunes(start.layers, end.layers):
            end = replace(end, layers=pruning.without_last(end.layers))
            ranks[client] = pruning.kept(max(f.rank for f in start.layers.values()))
        if settings.scaffold:
            own, new = variates.get(client, {}), variates_in(update.tensors)
            total, own = replaced_by(settings, total, client, own, new)
            variates[client] = shelve(exchange.round, own)
        if method.exchanges:
            weight = 1.0 if settings.weights == "uniform" else float(update.examples)
            aggregator.add(weight, start, end)
        if method.assignment.own and not method.assignment.dealt:
            own = update.kept if method.assignment.private else own_part(settings, flat(end))
            if own:  # private, and of a client elsewhere: there is nothing to keep
                kept[client] = shelve(exchange.round, own)
    result = aggregator.finish() if method.exchanges else None
    if result is not None:
        late = ((eta * shares[label], tally.late[label]) for label in sorted(tally.late))
        result = with_late(result, late)
    after = step(exchange.state, settings, result, clients, kept)
    return replace(after, ranks=ranks, variates=variates, variate=total), result


def count_down(exchange: Exchange) -> dict[str, int]:
    """Bytes of each client's message. It is a function of the client's rank, of the version that it
    holds, and of its own factors where it has such; equal ones are counted once."""
    state, settings = exchange.state, exchange.settings
    if not settings.method.exchanges:
        return dict.fromkeys(exchange.clients, 0)
    sizes: dict[object, int] = {}
    down = {}
    for client in exchange.clients:
        own = client if settings.method.assignment.own else None
        key = exchange.rank(client), state.held.get(client, 0), own
        if key not in sizes:
            sizes[key] = broadcast_nbytes(exchange.message(client), settings.wire_dtype)
        down[client] = sizes[key]
    return down
