"""Updates that come late: when, where they started, and what they add to an aggregate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.aggregator import Aggregate
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.seeding import derive
from fedex_lora.federation.messages import Update, replaced
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, start_of


@dataclass(frozen=True)
class Late:
    """An update of an earlier round that is taken in.

    Attributes:
        start: Where its client began.
        norm: Of the update.
    """

    update: Update
    start: AdapterState
    norm: float


def earlier_start(
    state: ServerState, settings: Settings, client: str, round: int
) -> AdapterState | None:
    """Where a client started an earlier round; None if that is too long ago."""
    past = state.past.get(round - 1)
    if past is None:
        return None
    then = replace(state, version=round - 1, factors=past.layers, head=past.head)
    return start_of(then, settings, client)


def delays(state: ServerState, settings: Settings, clients: Sequence[str]) -> dict[str, int]:
    """By how many rounds which of these clients are late in a rehearsal, a function of (seed,
    round): so few that the next round can have its quorum."""
    asynchronous, round = settings.asynchronous, state.version + 1
    if asynchronous is None or not asynchronous.delay:
        return {}

    def draw(client: str) -> tuple[float, int]:
        seed = derive(settings.seed, "late", round, client)
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand((), generator=generator).item()
        return chance, int(torch.randint(asynchronous.staleness, (), generator=generator)) + 1

    drawn = {client: draw(client) for client in clients}
    away = sum(p.due > round for p in state.pending.values())
    most = min(len(clients), len(settings.clients) - away) - settings.min_clients
    unlucky = sorted(clients, key=lambda client: drawn[client])[: max(0, most)]
    return {c: drawn[c][1] for c in unlucky if drawn[c][0] < asynchronous.delay}


def with_late(result: Aggregate, late: Iterable[tuple[float, Late]]) -> Aggregate:
    """The aggregate with late updates added, each by its share: to what goes into the base, and to
    the head."""
    increment, head = dict(result.increment), dict(result.head)
    for share, found in late:
        end = replaced(found.start, found.update.tensors)
        for name, f in end.layers.items():
            more = _change(found.start.layers[name], f).scaled(share)
            increment[name] = increment[name] + more if name in increment else more
        for name, value in end.head.items():
            head[name] = head[name] + share * (value - found.start.head[name])
    return replace(result, increment=increment, head=head)


def _change(start: Factors, end: Factors) -> Delta:
    """s(BA − B⁰A⁰) = s((B − B⁰)A + B⁰(A − A⁰)), which does not cancel."""
    left = torch.cat([end.B - start.B, start.B], dim=1) * start.scale
    return Delta(left, torch.cat([end.A, end.A - start.A]))


def remembered(before: ServerState, after: ServerState, settings: Settings) -> ServerState:
    """The state after a round, with the starts of all rounds of which updates may still come."""
    if settings.asynchronous is None:
        return after
    oldest = after.version - settings.asynchronous.staleness
    past = {**before.past, before.version: AdapterState(before.factors, before.head)}
    return replace(after, past={v: adapter for v, adapter in past.items() if v >= oldest})
