"""The server's state and the two pure functions of it: what to broadcast, and the next state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, fresh
from fedex_lora.aggregation.aggregator import Aggregate, wire_form
from fedex_lora.aggregation.ledger import Increment, Ledger
from fedex_lora.aggregation.lowrank import LowRank, concat, factored
from fedex_lora.federation.messages import Broadcast
from fedex_lora.federation.settings import Settings


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows after `version` rounds.

    Attributes:
        factors: What all clients get, at the full rank (own factors apart).
        own: Each client's own factors, where the method has such (and its head if nothing is
            exchanged).
        carry: By site, what of the increments was not sent yet.
        late: By message key, what a lossy wire dtype rounded off the averages; added next time.
        held: The version each client holds; absent means 0, the start, a function of the recipe.
        changed: The version at which "A", "B", "head" last changed; own factors as "own/NAME".
    """

    version: int
    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    own: Mapping[str, AdapterState] = field(default_factory=dict)
    carry: Mapping[str, LowRank] = field(default_factory=dict)
    late: Mapping[str, Tensor] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)


def begin(settings: Settings, initial: AdapterState) -> ServerState:
    """The state before round 1.

    Args:
        initial: Factors at the full rank and head. Where B ≠ 0 (an adapter to start from), all
            ranks must be equal.
    """
    own = {}
    if settings.method.own_factors:
        for client in settings.clients:
            factors = _cut(initial.sites, settings, client)
            own[client] = AdapterState(
                factors, {} if settings.method.exchanges else dict(initial.head)
            )
    ledger = Ledger()
    if not settings.method.shared_base:  # own increments are subtracted, so G must hold them
        started = {n: f.delta() for n, f in initial.sites.items() if f.B.any()}
        ledger = Ledger((), started, 0)
    return ServerState(0, dict(initial.sites), dict(initial.head), ledger, own)


def admit(
    state: ServerState, settings: Settings, initial: AdapterState, names: Iterable[str]
) -> tuple[ServerState, Settings]:
    """Clients that join: they hold nothing, and start their own factors from the initial ones."""
    wider = replace(settings, clients=tuple(sorted({*settings.clients, *names})))
    own = begin(wider, initial).own if settings.method.own_factors else {}
    return replace(state, own={**own, **state.own}), wider


def start_of(state: ServerState, settings: Settings, client: str) -> AdapterState:
    """The factors and head this client starts the next round from."""
    if client in state.own:
        return AdapterState(state.own[client].sites, state.own[client].head or state.head)
    return AdapterState(_cut(state.factors, settings, client), state.head)


def global_factors(state: ServerState, settings: Settings) -> Mapping[str, Factors]:
    """The factors that are part of G beside the base; none where the base W0 + T is all of it."""
    return state.factors if settings.method.shared_base else {}


def own_increment(state: ServerState, settings: Settings, client: str, site: str) -> LowRank | None:
    """What is subtracted from the base for this client: sᵢ·BᵢAᵢ where bases are per client."""
    if settings.method.shared_base:
        return None
    return state.own[client].sites[site].delta()


def broadcast_to(state: ServerState, settings: Settings, client: str) -> Broadcast:
    """What this client lacks: changed factors and head, and the ledger's newer entries."""
    held = state.held.get(client, 0)
    start = start_of(state, settings, client)
    part = state.ledger.since(held)
    if not settings.method.exchanges:
        return Broadcast(state.version + 1)
    head = start.head if state.changed.get("head", 0) > held else {}
    if settings.method.assignment == "reinit" and state.version:
        return Broadcast(state.version + 1, fresh=state.version, head=head, ledger=part)
    changed = {f: state.changed.get(f, 0) for f in "AB"}
    if client in state.own:
        changed = dict.fromkeys("AB", state.changed.get(f"own/{client}", 0))
    a = {n: f.A for n, f in start.sites.items()} if changed["A"] > held else {}
    b = {n: f.B for n, f in start.sites.items()} if changed["B"] > held else {}
    return Broadcast(state.version + 1, None, a, b, head, part)


def step(
    state: ServerState,
    settings: Settings,
    result: Aggregate | None,
    taken: Sequence[str],
    ends: Mapping[str, AdapterState],
) -> ServerState:
    """The state after one more round.

    Args:
        result: The aggregate; None where nothing is exchanged.
        taken: Clients whose updates were aggregated.
        ends: What they keep of their end states, where the assignment is "keep".
    """
    version = state.version + 1
    held = {**state.held, **dict.fromkeys(taken, version - 1)}
    if result is None:
        return replace(state, version=version, own={**state.own, **ends}, held=held)
    last = version == settings.rounds and settings.flush
    lossless = last or settings.wire_dtype == torch.float32
    dtype = torch.float32 if lossless else settings.wire_dtype
    head, late = _round_off(dict(result.head), state.late, "head", dtype)
    factors, missed, late_factors = _send_factors(state, settings, result, dtype)
    own, own_changed = _own(state, settings, result, taken, ends, dtype)
    sent, carry = _send_increment(state, settings, result.increment, missed, dtype, last)
    changed = {**dict.fromkeys(_changed(state, settings, dtype), version), **own_changed}
    ledger = state.ledger.append(version, sent).compact_if_smaller(version - 1)
    return ServerState(
        version,
        factors,
        head,
        ledger,
        own,
        carry,
        {**late, **late_factors},
        held,
        {**state.changed, **changed},
    )


def _changed(state: ServerState, settings: Settings, dtype: torch.dtype) -> set[str]:
    """An average changes what was trained; an svd assigns both; a lossless message brings what
    lossy ones left."""
    trained = settings.method.trained(state.version + 1)
    late = {name[0] for name in state.late if name[:2] in ("A/", "B/")}
    lossless = late if dtype == torch.float32 else set()
    assigned = set("AB") if settings.method.assignment == "svd" else set(trained)
    return {"head"} | assigned | lossless


def _cut(factors: Mapping[str, Factors], settings: Settings, client: str) -> dict[str, Factors]:
    """The first rows and columns, as many as the client's rank; B in units of its scale."""
    cut = {}
    for name, site in settings.sites_of(client).items():
        f = factors[name]
        same = site.rank == f.rank
        b = f.B if same else f.B[:, : site.rank] * (f.scale / site.scale)
        cut[name] = f if same else Factors(f.A[: site.rank].clone(), b.clone(), site.scale)
    return cut


def _round_off(
    values: dict[str, Tensor], late: Mapping[str, Tensor], kind: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the receivers decode of `values`, and what that leaves for the next time."""
    values = {n: v + late[f"{kind}/{n}"] if f"{kind}/{n}" in late else v for n, v in values.items()}
    if dtype == torch.float32:
        return values, {}
    sent = {n: v.to(dtype).float() for n, v in values.items()}
    return sent, {f"{kind}/{n}": v - sent[n] for n, v in values.items()}


def _send_factors(
    state: ServerState, settings: Settings, result: Aggregate, dtype: torch.dtype
) -> tuple[dict[str, Factors], dict[str, LowRank], dict[str, Tensor]]:
    """The shared factors as the clients decode them, and what rounding took: as increments of the
    base where the method has a ledger, else as tensors to add next time (averages only)."""
    if settings.method.assignment == "reinit":
        return fresh(settings.sites, settings.seed, state.version + 1), {}, {}
    if not settings.method.shared_base:
        return dict(state.factors), {}, {}
    in_ledger = settings.method.residual in ("exact", "truncated")
    averaged = settings.method.assignment == "average"
    late = state.late if averaged and not in_ledger else {}
    parts, new_late = {}, {}
    for x in "AB":
        parts[x] = {n: getattr(f, x) for n, f in result.factors.items()}
        if x in _changed(state, settings, dtype):
            parts[x], rest = _round_off(parts[x], late, x, dtype)
        else:  # frozen: not sent, so not rounded, and what waits goes on waiting
            rest = {k: v for k, v in late.items() if k.startswith(f"{x}/")}
        new_late |= rest
    a, b = parts["A"], parts["B"]
    sent = {n: Factors(a[n], b[n], f.scale) for n, f in result.factors.items()}
    if not in_ledger or dtype == torch.float32:
        return sent, {}, new_late if averaged else {}
    missed = {n: f.delta() + sent[n].delta().scaled(-1.0) for n, f in result.factors.items()}
    return sent, missed, {}


def _own(
    state: ServerState,
    settings: Settings,
    result: Aggregate,
    taken: Sequence[str],
    ends: Mapping[str, AdapterState],
    dtype: torch.dtype,
) -> tuple[dict[str, AdapterState], dict[str, int]]:
    """Own factors of the clients that took part; the absent keep theirs."""
    if not settings.method.own_factors:
        return {}, {}
    if settings.method.assignment == "keep":  # the client has them already: nothing to send
        return {**state.own, **ends}, {}
    own = dict(state.own)
    for client in taken:
        cut = _cut(result.factors, settings, client)
        rounded = {
            n: Factors(f.A.to(dtype).float(), f.B.to(dtype).float(), f.scale)
            for n, f in cut.items()
        }
        own[client] = AdapterState(rounded)
    return own, dict.fromkeys((f"own/{client}" for client in taken), state.version + 1)


def _send_increment(
    state: ServerState,
    settings: Settings,
    increment: Increment,
    missed: Mapping[str, LowRank],
    dtype: torch.dtype,
    last: bool,
) -> tuple[Increment, dict[str, LowRank]]:
    """What of the increments goes into the ledger now, and what is carried."""
    sent: dict[str, LowRank | Tensor] = {}
    carry: dict[str, LowRank] = {}
    truncated = settings.method.residual == "truncated" and not last
    for name in sorted({*increment, *missed, *state.carry}):
        whole = [increment.get(name), missed.get(name), state.carry.get(name)]
        parts = [w for w in whole if w is not None]
        if not truncated and dtype == torch.float32 and len(parts) == 1:
            sent[name] = wire_form(parts[0])
            continue
        total = concat([factored(w) for w in parts])
        rank = settings.rank if truncated else _rank_now(whole[:2], last, total.rank)
        head, tail = total.split(rank or 0)
        sent[name] = _as_sent(head, dtype)
        if dtype != torch.float32:
            tail = concat([tail, head, factored(sent[name]).scaled(-1.0)]).compress()
        if settings.carry and tail.rank:
            carry[name] = tail
    return sent, carry


def _rank_now(parts: Sequence[LowRank | Tensor | None], last: bool, whole: int) -> int:
    """The rank of this round's own increments: what is carried must not make messages grow."""
    return whole if last else sum(factored(w).rank for w in parts if w is not None)


def _as_sent(w: LowRank, dtype: torch.dtype) -> LowRank | Tensor:
    form = wire_form(w)
    if dtype == torch.float32:
        return form
    if isinstance(form, LowRank):
        return form.to(dtype).to(torch.float32)
    return form.to(dtype).float()
