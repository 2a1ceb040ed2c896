"""An institution's side of a federation across machines: bytes in, bytes out.

`handle` checks what it is told, brings what the client holds up to date, scores the incoming model
and trains. It knows nothing of how messages travel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Site
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.remote.cache import Cache, Held
from fedex_lora.engines.remote.wire import (
    NOTHING,
    PROTOCOL,
    Facts,
    Identity,
    agreed,
    agreement,
    facts,
    most_down,
)
from fedex_lora.errors import UserError, for_others
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    decode_broadcast,
    decode_update,
    encode_about,
    encode_update,
    read_about,
    receive,
)
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, begin, start_of
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.tasks import Task

log = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Institution:
    """A client, brought to life from its own recipe and its own rows.

    Attributes:
        cache: Folder for what it is sent; one below it for every federation.
        settings: The federation's, as far as this client knows them.
        rows: Training rows, encoded.
        validation: Its own validation rows, encoded; None if clients do not score models.
        initial: What all clients start from, at the full rank.
        versions: Of the packages that numbers depend on.
    """

    name: str
    cache: Path
    recipe: Recipe
    task: Task
    model: AdaptedModel
    settings: Settings
    rows: Dataset
    validation: Dataset | None
    initial: AdapterState
    versions: Mapping[str, str | None]


class Lacks(UserError):
    """The client holds less than the server believes."""

    def __init__(self, version: int) -> None:
        super().__init__(f"holds version {version}")
        self.version = version


def handle(blob: bytes, institution: Institution) -> bytes:
    """The reply to one message.

    What the user of this side can mend is logged here, and told the coordinator by name.
    """
    about: dict[str, Any] = {}
    try:
        about = read_about(blob, most_down(institution.settings, institution.initial))
        kind = about.get("kind")
        if kind == "hello":
            return _hello(about, institution)
        if kind == "refused":
            return refused(about, institution.name)
        if kind in ("round", "final"):
            return _turn(blob, about, institution)
        raise UserError(f"a message of unknown kind {str(kind)[:40]!r}; install the same version")
    except Lacks as lacks:
        log.warning("%s %s; asking the coordinator for the rest", institution.name, lacks)
        return _say(about, institution.name, "lacks", version=lacks.version)
    except Exception as error:
        return unable(about, institution.name, error)


def unable(about: Mapping[str, Any], name: str, error: Exception) -> bytes:
    """The reply of a client that cannot do what it is asked to: `error` is logged here as a whole,
    and told the coordinator as far as it may be."""
    log.error("%s", error, exc_info=None if isinstance(error, UserError) else error)
    kind = "unfit" if about.get("kind") == "hello" else "failed"
    return _say(about, name, kind, reason=for_others(error)[:2000])


def refused(about: Mapping[str, Any], name: str) -> bytes:
    """The reply to a coordinator that does not take this client, which is said here."""
    why = "".join(c if c.isprintable() else " " for c in str(about.get("reason"))[:500])
    return unable(about, name, UserError(f"the coordinator refuses this client: {why!r}"))


def undecided(about: Mapping[str, Any], name: str, reason: str) -> bytes:
    """The reply of a client whose operator has not said yet whether it takes part."""
    return _say(about, name, "undecided", reason=reason)


def run_of(about: Mapping[str, Any]) -> str:
    """The run that a message belongs to, by its number.

    Raises:
        UserError: It has none.
    """
    federation = _field(about, "federation", str)
    if len(federation) != 32 or not set(federation) <= set("0123456789abcdef"):
        raise UserError("a message without a federation's number")
    return federation


def _common(about: Mapping[str, Any], client: str) -> dict[str, Any]:
    """What every reply begins with; whose it is tells the node, and is compared with this name."""
    return {"protocol": PROTOCOL, "federation": about.get("federation"), "client": client}


def _say(about: Mapping[str, Any], client: str, kind: str, **more: object) -> bytes:
    return encode_about({**_common(about, client), "kind": kind, **more})


def _hello(about: Mapping[str, Any], institution: Institution) -> bytes:
    if about.get("protocol") != PROTOCOL:
        raise UserError(
            f"speaks protocol {PROTOCOL}, the coordinator {str(about.get('protocol'))[:20]}; "
            "install the same version of fedex-lora on both sides"
        )
    theirs = Facts(_field(about, "agreed", dict), _field(about, "digests", dict))
    recipe, task = institution.recipe, institution.task
    mine = facts(recipe, task, institution.model, institution.initial)
    if different := mine.differences(theirs):
        raise UserError(
            f"not the coordinator's recipe: {'; '.join(different)}. Take the coordinator's recipe "
            "or agree with it on another"
        )
    identity = _identity(about)
    held = _load(Cache(_folder(institution, identity)), identity)
    rows = len(institution.rows)
    log.info("run %s: greeted, ready with %d rows", identity.federation[:8], rows)
    return _say(
        about,
        institution.name,
        "hello",
        rows=len(institution.rows),
        validation=len(institution.validation or ()),
        held=_least(institution.settings) if held is None else held.version,
        versions=dict(institution.versions),
        time=time.time(),
    )


def _turn(blob: bytes, about: Mapping[str, Any], institution: Institution) -> bytes:
    """Catches up; then scores, trains or both."""
    identity = _identity(about)
    if about.get("client") != institution.name:
        raise UserError(f"a message for {str(about.get('client'))[:80]!r}, not for this client")
    if about.get("recipe") != agreement(agreed(institution.recipe, institution.task)):
        raise UserError("the recipe has changed since the run began; begin a new run")
    _check_round(about, institution.recipe.federation.rounds)
    cache = Cache(_folder(institution, identity))
    settings = replace(institution.settings, clients=(institution.name,))
    held = _caught_up(blob, about, cache, identity, institution, settings)
    cache.save(held)
    state = _view(held, settings, institution.name)
    engine = _engine(institution, settings)
    scores: dict[str, float] = {}
    what, final = f"run {identity.federation[:8]}", about["kind"] == "final"
    what += ": the last model" if final else f", round {state.version + 1} of {settings.rounds}"
    log.info("%s: %s received, %d rows here", what, _size(blob), len(institution.rows))
    if about.get("evaluate") and institution.validation is not None:
        scores = engine.score(state, institution.name)
    if final:
        return _say(about, institution.name, "scores", scores=scores, version=held.version)
    reply, loss = _train(about, engine, state, held, scores, cache)
    log.info("%s: trained, loss %.4g, %s to send", what, loss, _size(reply))
    return reply


def _check_round(about: Mapping[str, Any], rounds: int) -> None:
    """No round is taken part in but those of this client's own recipe."""
    version = _field(about, "version", int)
    if version > rounds - (about["kind"] == "round"):
        raise UserError(
            f"asked for round {version + 1}; this client's recipe has {rounds} rounds "
            "(federation.rounds), which is what it agreed to"
        )


def _size(blob: bytes) -> str:
    return f"{len(blob) / 1e3:.1f} kB" if len(blob) < 1e6 else f"{len(blob) / 1e6:.1f} MB"


def _train(
    about: Mapping[str, Any],
    engine: LocalEngine,
    state: ServerState,
    held: Held,
    scores: Mapping[str, float],
    cache: Cache,
) -> tuple[bytes, float]:
    """The update's message, and the training loss."""
    settings = engine.settings
    (client,) = settings.clients
    update = next(engine.exchange(state, {client: Broadcast(state.version + 1)}))
    assert isinstance(update, Update)
    start = start_of(state, settings, client)
    said = _common(about, client) | {"kind": "update"}
    blob = encode_update(replace(update, scores=scores), start, settings.wire_dtype, said)
    if settings.method.assignment == "keep":
        cache.save(replace(held, ends={**held.ends, update.round: _end(blob, start, client)}))
    return blob, update.metrics["loss"]


def _end(blob: bytes, start: AdapterState, client: str) -> dict:
    """The factors that the server decodes: with a lossy wire those count here too."""
    update = decode_update(blob, start, client)
    return {
        name: replace(f, A=update.A.get(name, f.A), B=update.B.get(name, f.B))
        for name, f in start.sites.items()
    }


def _engine(institution: Institution, settings: Settings) -> LocalEngine:
    rows = {} if institution.validation is None else {institution.name: institution.validation}
    return LocalEngine(
        institution.model,
        institution.task,
        {institution.name: institution.rows},
        settings,
        institution.recipe.trainer_arguments,
        rows=rows,
        batch_size=institution.recipe.evaluation.batch_size,
    )


def _identity(about: Mapping[str, Any]) -> Identity:
    try:
        lineage = tuple((int(v), str(mark)[:64]) for v, mark in _field(about, "lineage", list))
    except (ValueError, TypeError, OverflowError):
        raise UserError("a message whose lineage cannot be read") from None
    return Identity(run_of(about), lineage or ((0, ""),))


def _field(about: Mapping[str, Any], name: str, kind: type[Value]) -> Value:
    value = about.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"a message without its {name}; install the same version on both sides")
    return value


def _folder(institution: Institution, identity: Identity) -> Path:
    return institution.cache / identity.federation / institution.name


def _load(cache: Cache, identity: Identity) -> Held | None:
    held = cache.load()
    if held is not None and not identity.holds(held.version, held.mark):
        log.warning("what is held was thrown away by the coordinator; beginning anew")
        held = None
    if held is None:
        cache.clear()
    return held


def _caught_up(
    blob: bytes,
    about: Mapping[str, Any],
    cache: Cache,
    identity: Identity,
    institution: Institution,
    settings: Settings,
) -> Held:
    """What is held after this message.

    Raises:
        Lacks: The server believes that more is held; it has to send from the version that is.
        UserError: The message is none of this federation's.
    """
    first = begin(settings, institution.initial)
    start = start_of(first, settings, institution.name)
    held = _load(cache, identity) or Held(0, identity.lineage[0][1], start, first.ledger)
    message = decode_broadcast(blob, most_down(settings, institution.initial))
    base, own, version = (_field(about, name, int) for name in ("held", "own", "version"))
    if held.version < base:
        raise Lacks(_least(settings) if settings.method.own_factors else held.version)
    sites = settings.sites_of(institution.name)
    _check_broadcast(message, version, sites, held.adapter.head)
    adapter = receive(held.adapter, message, sites, settings.seed)
    ends = {round: end for round, end in held.ends.items() if round >= own}
    if own and message.A:  # they came back from the server
        ends = {own: adapter.sites}
    elif own:
        if own not in ends:
            raise Lacks(NOTHING)
        adapter = AdapterState(ends[own], adapter.head)
    ledger = held.ledger.extended(message.ledger, version)
    mark = identity.lineage[-1][1]
    return Held(version, mark, adapter, ledger, ends)


def _least(settings: Settings) -> int:
    """What a client without a memory can make up for by itself: the start, but no own factors."""
    return NOTHING if settings.method.own_factors else 0


def _view(held: Held, settings: Settings, client: str) -> ServerState:
    """The server's state as far as this client can see it."""
    own = {client: AdapterState(held.adapter.sites)} if settings.method.own_factors else {}
    sites, head = held.adapter.sites, held.adapter.head
    return ServerState(held.version, sites, head, held.ledger, own)


def _check_broadcast(
    message: Broadcast, version: int, sites: Mapping[str, Site], head: Mapping[str, Tensor]
) -> None:
    if message.round != version + 1 or version < 0:
        raise UserError(f"round {message.round} after version {version}; messages are mixed up")
    if message.fresh is not None and message.fresh != version:
        raise UserError(f"factors of version {message.fresh}; expected {version}")
    _check_shapes("A", message.A, {n: (s.rank, s.inp) for n, s in sites.items()})
    _check_shapes("B", message.B, {n: (s.out, s.rank) for n, s in sites.items()})
    _check_shapes("head", message.head, {n: tuple(t.shape) for n, t in head.items()})
    _check_ledger(message.ledger, version, sites)


def _check_shapes(
    kind: str, got: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, value in got.items():
        if tuple(value.shape) != expected.get(name):
            raise UserError(f"the coordinator's {kind} of {name[:80]!r} does not fit the model")
        if not torch.isfinite(value).all():
            raise UserError(f"the coordinator's {kind} of {name[:80]!r} is not finite")


def _check_ledger(ledger: Ledger, version: int, sites: Mapping[str, Site]) -> None:
    versions = [v for v, _ in ledger.entries]
    if not all(type(v) is int for v in (*versions, ledger.snapshot_version)):
        raise UserError("the coordinator's ledger has versions that are no numbers")
    if (
        versions != sorted(set(versions))
        or any(not 0 < v <= version for v in versions)
        or not (0 <= ledger.snapshot_version <= version)
    ):
        raise UserError("the coordinator's ledger has entries in disorder")
    for increment in (ledger.snapshot, *(inc for _, inc in ledger.entries)):
        shapes = {n: (s.out, s.inp) for n, s in sites.items()}
        parts = {
            n: [w.left, w.right] if isinstance(w, LowRank) else [w] for n, w in increment.items()
        }
        for name, w in increment.items():
            if tuple(w.shape) != shapes.get(name):
                raise UserError(f"the coordinator's increment of {name[:80]!r} does not fit")
            if not all(torch.isfinite(t).all() for t in parts[name]):
                raise UserError(f"the coordinator's increment of {name[:80]!r} is not finite")
