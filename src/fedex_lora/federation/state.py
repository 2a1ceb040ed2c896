"""The server's state and the two pure functions of it: what to broadcast, and the next state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import (
    AdapterState,
    Factors,
    LayerShape,
    fresh,
    inner_name,
    weight_name,
)
from fedex_lora.aggregation.aggregator import Aggregate
from fedex_lora.aggregation.delta import Delta, concat
from fedex_lora.aggregation.ledger import Increment, Ledger
from fedex_lora.aggregation.seeding import derive
from fedex_lora.aggregation.sparse import sparse_name, spread
from fedex_lora.federation.messages import (
    VARIATE,
    Broadcast,
    Pending,
    Tensors,
    flat,
    only,
    prefixed,
    replaced,
)
from fedex_lora.federation.optimizing import optimized
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.variates import correction


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows after `version` rounds.

    Attributes:
        factors: What all clients get, at the full rank (own factors apart).
        head: What all clients get of the head.
        own: Each client's own tensors by flat name, where the method has such. Private ones are
            known of clients in this process alone, once they have trained.
        carry: Error feedback: by layer, what of the increments was not sent yet.
        late: By flat name, what a lossy wire dtype rounded off the averages; added next time.
        held: The version each client holds; absent means 0, the start, a function of the recipe.
        changed: The version at which "A", "B", "head" last changed; own factors as "own/NAME".
        taken: The last round of which a client's update was taken.
        optimizer: What the server's optimizer remembers.
        ranks: Of clients whose rank was pruned.
        past: By version, what rounds started from of which updates may still come late.
        pending: Updates that are held back, by client.
        variates: Every client's control variate cᵢ by flat name, where there are some, and
        variate: Σ nᵢcᵢ.
    """

    version: int
    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    own: Mapping[str, Tensors] = field(default_factory=dict)
    carry: Mapping[str, Delta] = field(default_factory=dict)
    late: Mapping[str, Tensor] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    taken: Mapping[str, int] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    variates: Mapping[str, Tensors] = field(default_factory=dict)
    variate: Tensors = field(default_factory=dict)
    past: Mapping[int, AdapterState] = field(default_factory=dict)
    pending: Mapping[str, Pending] = field(default_factory=dict)


def begin(settings: Settings, initial: AdapterState) -> ServerState:
    """The state before round 1.

    Args:
        initial: Factors at the full rank and head. Where B ≠ 0 (an adapter to start from), all
            ranks must be equal.
    """
    initial = first(settings, initial)
    own, assignment = {}, settings.method.assignment
    if assignment.own and not assignment.private:  # else the server has nothing of them
        for client in settings.clients:
            layers = cut(initial.layers, settings.layers_of(client))
            whole = AdapterState(layers, initial.head)
            own[client] = own_part(settings, flat(whole))
    ledger = Ledger()
    if not settings.method.shared_base:  # own increments are subtracted, so G must hold them
        started = {n: f.delta() for n, f in initial.layers.items() if f.B.any()}
        ledger = Ledger((), started, 0)
    return ServerState(0, dict(initial.layers), initial.head, ledger, own)


def first(settings: Settings, initial: AdapterState) -> AdapterState:
    """What the method makes of the initial factors and head before round 1; G is as loaded."""
    layers, head = {}, dict(initial.head)
    for name, shape in settings.layers.items():
        seed = derive(settings.seed, "first", name)
        given = settings.method.assignment.first(shape, initial.layers[name], seed)
        assert given.factors is not None
        layers[name] = given.factors
        if given.inner is not None:
            head[inner_name(name)] = given.inner
        if given.sparse is not None:
            head[sparse_name(name)] = given.sparse
    return AdapterState(layers, head)


def admit(
    state: ServerState, settings: Settings, initial: AdapterState, names: Iterable[str]
) -> tuple[ServerState, Settings]:
    """Clients that join: they hold nothing, and start their own factors from the initial ones."""
    wider = replace(settings, clients=tuple(sorted({*settings.clients, *names})))
    return replace(state, own={**begin(wider, initial).own, **state.own}), wider


def own_part(settings: Settings, tensors: Tensors) -> dict[str, Tensor]:
    """Of a client's tensors those that are its own: they stay with it from round to round."""
    assignment = settings.method.assignment
    return only(tensors, assignment.own | ({"head"} if assignment.head_private else set()))


def sent_part(settings: Settings, tensors: Tensors, round: int) -> dict[str, Tensor]:
    """Of a client's tensors those that its update of a round holds, and their variates."""
    found = only(tensors, settings.method.sent(round))
    if settings.scaffold:
        found |= {name: tensors[name] for name in prefixed(found)}
    return found


def start_of(state: ServerState, settings: Settings, client: str) -> AdapterState:
    """The factors and head this client starts the next round from. Where gradients of whole weights
    are to be sent, they are part of that head, and zero."""
    head = state.head
    if settings.method.sends_gradients(state.version + 1):
        zeros = {weight_name(n): torch.zeros(s.out, s.inp) for n, s in settings.layers.items()}
        head = {**head, **zeros}
    layers = settings.layers_of(client, state.ranks.get(client))
    pair = settings.method.assignment.pair(layers, settings.seed)
    shared = AdapterState(cut(state.factors, layers), head, pair=pair)
    if settings.scaffold:
        method, mine = settings.method, state.variates.get(client, {})
        ever = only(flat(shared), method.trained(1) | method.trained(2) | {"head"})
        shared = replace(shared, variates=correction(settings, state.variate, mine, ever))
    own = state.own.get(client)
    return shared if own is None else replaced(shared, dict(own.items()))


def global_factors(state: ServerState, settings: Settings) -> Mapping[str, Factors]:
    """The factors that are part of G beside the base; none where the base W0 + T is all of it."""
    return state.factors if settings.method.shared_base else {}


def base_increment(
    ledger: Ledger, layer: str, own: Factors | None = None, fold: bool = True
) -> Delta | None:
    """T − own of one layer: what the base has beyond the pretrained weights.

    Folding takes T as the left fold, the same bits for everybody; beside the layer factors do.

    Args:
        own: The client's factors, where each client has a base of its own: base + s·B·A = G.
    """
    if fold:
        total = ledger.total(layer)
        delta = None if total is None else Delta(total)
    else:
        delta = ledger.factored(layer)
    if own is None:
        return delta
    return own.delta().scaled(-1.0) if delta is None else delta - own.delta()


def broadcast_to(
    state: ServerState, settings: Settings, client: str, held: int | None = None
) -> Broadcast:
    """What this client lacks: changed factors and head, and the ledger's newer entries.

    Args:
        held: The version that it holds, if another than the state says; −1 for a client that lost
            even its own factors.
    """
    round, assignment = state.version + 1, settings.method.assignment
    own = 0 if assignment.dealt or not assignment.own else state.taken.get(client, 0)
    if not settings.method.exchanges:
        return Broadcast(round, own=own)
    held = state.held.get(client, 0) if held is None else held
    part = state.ledger.since(held)
    if assignment.drawn and state.version:
        head = {f"head/{n}": t for n, t in state.head.items()}
        changed = state.changed.get("head", 0) > held
        return Broadcast(round, head if changed else {}, part, state.version)
    when = {x: state.changed.get(x, 0) for x in ("head", VARIATE)}
    for x in "AB":
        when[x] = state.changed.get(f"own/{client}" if x in assignment.own else x, 0)
    if assignment.private:  # the server does not know them
        when |= dict.fromkeys(assignment.own, -1)
    tensors = flat(start_of(state, settings, client))
    changed = only(tensors, {x for x in when if when[x] > held})
    return Broadcast(round, changed, part, own=own)


def delivered(state: ServerState, clients: Iterable[str]) -> ServerState:
    """The state once these clients hold it."""
    return replace(state, held={**state.held, **dict.fromkeys(clients, state.version)})


def step(
    state: ServerState,
    settings: Settings,
    result: Aggregate | None,
    taken: Sequence[str],
    kept: Mapping[str, Tensors],
) -> ServerState:
    """The state after one more round.

    Args:
        result: The aggregate; None where nothing is exchanged.
        taken: Clients whose updates were aggregated.
        kept: What they keep as their own, where factors stay with the clients.
    """
    version = state.version + 1
    known = delivered(state, taken)
    state = replace(known, taken={**state.taken, **dict.fromkeys(taken, version)})
    if result is None:
        return replace(state, version=version, own={**state.own, **kept})
    if settings.method.assignment.sparse(version):
        result = _condensed(settings, result, version)
    memory = state.optimizer
    if settings.optimizer is not None:
        method, before = settings.method, global_factors(state, settings)
        fixed = result.factors if method.shared_base else {}
        ledger = fixed if method.in_ledger else None
        trained = method.trained(version)
        result, memory = optimized(
            settings.optimizer, memory, result, before, state.head, ledger, trained
        )
    last = version == settings.rounds and settings.flush
    lossless = last or settings.wire_dtype == torch.float32
    dtype = torch.float32 if lossless else settings.wire_dtype
    head, late = _round_off(dict(result.head), state.late, "head", dtype)
    factors, missed, late_factors = _send_factors(state, settings, result, dtype)
    own, own_changed = _own(state, settings, result, taken, kept, dtype)
    sent, carry = _send_increment(state, settings, result.increment, missed, dtype, last)
    changed = {**dict.fromkeys(_changed(state, settings, dtype), version), **own_changed}
    ledger = state.ledger.append(version, sent).compact_if_smaller(version - 1)
    return replace(
        state,
        version=version,
        factors=factors,
        head=head,
        ledger=ledger,
        own=own,
        carry=carry,
        late={**late, **late_factors},
        changed={**state.changed, **changed},
        optimizer=memory,
    )


def _condensed(settings: Settings, result: Aggregate, version: int) -> Aggregate:
    """After the last round of a sparse change of the whole weights: factors in its place."""
    assignment, head, factors = settings.method.assignment, dict(result.head), {}
    if assignment.sparse(version + 1):
        return result
    for name, layer in settings.layers.items():
        change = spread(name, layer.out, layer.inp, head.pop(sparse_name(name)))
        factors[name] = assignment.condensed(layer, change)
    return replace(result, head=head, factors=factors)


def cut(factors: Mapping[str, Factors], layers: Mapping[str, LayerShape]) -> dict[str, Factors]:
    """The first rows and columns, as many as the layers' rank; B in units of its scale."""
    found = {}
    for name, layer in layers.items():
        f = factors[name]
        same = layer.rank == f.rank
        b = f.B if same else f.B[:, : layer.rank] * (f.scale / layer.scale)
        found[name] = f if same else Factors(f.A[: layer.rank].clone(), b.clone(), layer.scale)
    return found


def _changed(state: ServerState, settings: Settings, dtype: torch.dtype) -> set[str]:
    """What is new for all clients; a lossless message also brings what lossy ones left."""
    late = {name[0] for name in state.late if name[:2] in ("A/", "B/")}
    lossless = late if dtype == torch.float32 else set()
    variates = {VARIATE} if settings.scaffold else set()
    return {"head"} | variates | settings.method.sent_down(state.version + 1) | lossless


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
) -> tuple[dict[str, Factors], dict[str, Delta], dict[str, Tensor]]:
    """The shared factors as the clients decode them, and what rounding took: as increments of the
    base where the method has a ledger, else as tensors to add next time (means only)."""
    method, assignment = settings.method, settings.method.assignment
    if assignment.drawn:
        return fresh(settings.layers, settings.seed, state.version + 1), {}, {}
    means = bool(method.trained(state.version + 1)) and not assignment.needs
    late = state.late if means and not method.in_ledger else {}
    parts, new_late = {}, {}
    for x in "AB":
        source = result.factors if x in assignment.shared else state.factors
        parts[x] = {n: getattr(f, x) for n, f in source.items()}
        if x in _changed(state, settings, dtype):
            parts[x], rest = _round_off(parts[x], late, x, dtype)
        else:  # frozen or own: not sent, so not rounded, and what waits goes on waiting
            rest = {k: v for k, v in late.items() if k.startswith(f"{x}/")}
        new_late |= rest
    a, b = parts["A"], parts["B"]
    sent = {n: Factors(a[n], b[n], f.scale) for n, f in state.factors.items()}
    # a base per client makes up for what rounding took: base + s·B·A = G with what it was sent
    if not method.in_ledger or dtype == torch.float32 or not method.shared_base:
        return sent, {}, new_late if means else {}
    missed = {n: f.delta() - sent[n].delta() for n, f in result.factors.items()}
    return sent, missed, {}


def _own(
    state: ServerState,
    settings: Settings,
    result: Aggregate,
    taken: Sequence[str],
    kept: Mapping[str, Tensors],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensors], dict[str, int]]:
    """Own tensors of the clients that took part; the absent keep theirs."""
    if not settings.method.assignment.dealt:  # a client has them already: nothing to send
        return {**state.own, **kept}, {}
    own = dict(state.own)
    for client in taken:
        given = flat(AdapterState(cut(result.factors, settings.layers_of(client))))
        own[client] = {name: t.to(dtype).float() for name, t in given.items()}
    return own, dict.fromkeys((f"own/{client}" for client in taken), state.version + 1)


def _send_increment(
    state: ServerState,
    settings: Settings,
    increment: Increment,
    missed: Mapping[str, Delta],
    dtype: torch.dtype,
    last: bool,
) -> tuple[Increment, dict[str, Delta]]:
    """What of the increments goes into the ledger now, and what is carried."""
    sent: dict[str, Delta] = {}
    carry: dict[str, Delta] = {}
    truncated = settings.method.residual == "truncated" and not last
    for name in sorted({*increment, *missed, *state.carry}):
        now = [w for w in (increment.get(name), missed.get(name)) if w is not None]
        parts = [*now, *([state.carry[name]] if name in state.carry else [])]
        if not truncated and dtype == torch.float32 and len(parts) == 1:
            sent[name] = parts[0].wire_form()
            continue
        total = concat(parts)
        # what is carried must not make messages grow
        whole = total.rank if last else sum(w.rank for w in now)
        head, tail = total.split(settings.rank or 0 if truncated else whole)
        sent[name] = head.wire_form().to(dtype).to(torch.float32)
        if dtype != torch.float32:
            tail = concat([tail, head, sent[name].scaled(-1.0)]).compress()
        if settings.carry and tail.rank:
            carry[name] = tail
    return sent, carry
