"""An institution's side of a federation across machines: bytes in, bytes out.

`handle` checks what it is told, brings what the client holds up to date, then trains or scores. It
knows nothing of how messages travel.
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

from fedex_lora.aggregation.adapter import AdapterState, LayerShape
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.engines.private.begin import Spending, plan_of, private_trainer
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
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.transforms import clip
from fedex_lora.engines.turn import Train, Transform, Turn, take_turns
from fedex_lora.errors import UserError, for_others
from fedex_lora.federation.codec import (
    decode_broadcast,
    decode_update,
    encode_about,
    encode_update,
    read_about,
    worded,
)
from fedex_lora.federation.messages import Broadcast, Tensors, Update, flat, receive, replaced
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import begin, own_part, start_of
from fedex_lora.recipe import Recipe

log = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Institution:
    """A client, brought to life from its own recipe and its own rows.

    Attributes:
        cache: Folder for what it is sent; one below it for every federation.
        stage: Its model.
        settings: The federation's, as far as this client knows them; its own is the only name.
        rows: Training rows, encoded.
        validation: Its own validation rows, encoded; None if clients do not score models.
        initial: What all clients start from, at the full rank.
        train: What trains it.
        versions: Of the packages that numbers depend on.
        transform: What becomes of an update before it is sent.
    """

    name: str
    cache: Path
    recipe: Recipe
    stage: Stage
    settings: Settings
    rows: Dataset
    validation: Dataset | None
    initial: AdapterState
    train: Train
    versions: Mapping[str, str | None]
    transform: Transform | None = None


def bring_to_life(
    federation: Federation,
    name: str,
    cache: Path,
    versions: Mapping[str, str | None],
    account: Spending | None = None,
) -> Institution:
    """The client of that name, of what `set_up_client` made of its recipe and its rows.

    Args:
        account: Where it takes down what it spends of its privacy; by default in memory.
    """
    recipe, task = federation.recipe, federation.task
    settings = replace(federation.settings, clients=(name,))
    plan = plan_of(recipe, settings, {name: len(federation.clients[name])})
    train: Train = HFTrainer(task, recipe.trainer_arguments, proximal=recipe.federation.proximal)
    if plan is not None:
        train = private_trainer(recipe, task, plan, account)
    return Institution(
        name,
        cache,
        recipe,
        Stage(federation.model, task, settings.method, recipe.evaluation.batch_size),
        settings,
        federation.clients[name],
        federation.validation.get(name),
        federation.initial,
        train,
        versions,
        None if recipe.privacy.client_level is None else clip(recipe.privacy.client_level.clip),
    )


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
        if kind in ("round", "evaluate", "final"):
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
    recipe, stage = institution.recipe, institution.stage
    mine = facts(recipe, stage.task, stage.model, institution.initial)
    if different := mine.differences(theirs):
        raise UserError(
            f"not the coordinator's recipe: {'; '.join(different)}. Take the coordinator's recipe "
            "or agree with it on another"
        )
    identity = _identity(about)
    held = _load(Cache(_folder(institution, identity)), identity, institution.settings)
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
    """Catches up; then trains, or scores what it was sent."""
    identity = _identity(about)
    if about.get("client") != institution.name:
        raise UserError(f"a message for {str(about.get('client'))[:80]!r}, not for this client")
    if about.get("recipe") != agreement(agreed(institution.recipe, institution.stage.task)):
        raise UserError("the recipe has changed since the run began; begin a new run")
    _check_round(about, institution.recipe.federation.rounds)
    cache = Cache(_folder(institution, identity))
    held = _caught_up(blob, about, cache, identity, institution)
    cache.save(held)
    kind, count = about["kind"], len(institution.rows)
    number = f"round {held.version + 1} of {institution.settings.rounds}"
    known = {"evaluate": f"the model after round {held.version}", "final": "the last model"}
    what = f"run {identity.federation[:8]}, {known.get(kind, number)}"
    log.info("%s: %s received, %d rows here", what, _size(blob), count)
    if kind == "round":
        reply, update = _train(about, institution, held, cache)
        loss = update.metrics.get("loss")
        told = "" if loss is None else f", loss {loss:.4g}"
        log.info("%s: trained%s, %s to send", what, told, _size(reply))
        return reply
    scores: Mapping[str, float] = {}
    if about.get("evaluate") is True and institution.validation is not None:
        institution.stage.show(held.ledger, held.adapter)
        scores = institution.stage.score(institution.validation, held.version)
    return _say(about, institution.name, "scores", scores=scores, version=held.version)


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
    about: Mapping[str, Any], institution: Institution, held: Held, cache: Cache
) -> tuple[bytes, Update]:
    """The update's message, and the update; own factors are put where they are kept."""
    settings, client, round = institution.settings, institution.name, held.version + 1
    start, rows = held.adapter, institution.rows
    turn = Turn(client, round, rows, start, settings.method.trained(round), settings.seed)
    (update,) = take_turns(
        institution.stage, institution.train, [turn], held.ledger, settings, institution.transform
    )
    said = _common(about, client) | {"kind": "update"}
    blob = encode_update(update, start, settings.wire_dtype, said)
    assignment = settings.method.assignment
    if assignment.own and not assignment.dealt:
        # with a lossy wire, what the server decodes counts here too
        decoded = decode_update(blob, start, client).tensors
        end = own_part(settings, {**flat(start), **update.kept, **decoded})
        cache.save(replace(held, ends={**held.ends, round: end}))
    return blob, update


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


def _load(cache: Cache, identity: Identity, settings: Settings) -> Held | None:
    held = cache.load()
    if held is not None and not identity.holds(held.version, held.mark):
        log.warning("what is held was thrown away by the coordinator; beginning anew")
        if settings.method.assignment.private:  # nobody else has the client's own factors
            return replace(held, version=NOTHING)
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
) -> Held:
    """What is held after this message.

    Raises:
        Lacks: The server believes that more is held; it has to send from the version that is.
        UserError: The message is none of this federation's.
    """
    settings, name = institution.settings, institution.name
    message = decode_broadcast(blob, most_down(settings, institution.initial))
    base, version = (_field(about, key, int) for key in ("held", "version"))
    first = begin(settings, institution.initial)
    held = _load(cache, identity, settings)
    ends = {} if held is None else dict(held.ends)
    if held is None or held.version == NOTHING:
        held = Held(0, identity.lineage[0][1], start_of(first, settings, name), first.ledger)
    if held.version < base:
        raise Lacks(_least(settings) if settings.method.assignment.own else held.version)
    layers = settings.layers_of(name)
    _check_broadcast(message, version, layers, held.adapter)
    adapter = receive(held.adapter, message, layers, settings.seed)
    ends = {round: end for round, end in ends.items() if round >= message.own}
    if message.own:
        adapter, ends = _own(adapter, message, ends, settings)
    ledger = held.ledger.extended(message.ledger, version)
    return Held(version, identity.lineage[-1][1], adapter, ledger, ends)


def _own(
    adapter: AdapterState, message: Broadcast, ends: Mapping[int, Tensors], settings: Settings
) -> tuple[AdapterState, Mapping[int, Tensors]]:
    """The adapter with the client's own tensors as it ended the round that the server last took
    from it, and what else of them is kept."""
    if own_part(settings, message.tensors):  # they came back from the server
        return adapter, {message.own: own_part(settings, flat(adapter))}
    if message.own in ends:
        return replaced(adapter, ends[message.own]), ends
    if not settings.method.assignment.private:
        raise Lacks(NOTHING)
    log.warning("this client's own factors are lost; it starts them anew")
    return adapter, ends


def _least(settings: Settings) -> int:
    """What a client without a memory can make up for by itself: the start, but no own factors
    that the server has."""
    assignment = settings.method.assignment
    return NOTHING if assignment.own and not assignment.private else 0


def _check_broadcast(
    message: Broadcast, version: int, layers: Mapping[str, LayerShape], held: AdapterState
) -> None:
    if message.round != version + 1 or version < 0:
        raise UserError(f"round {message.round} after version {version}; messages are mixed up")
    if message.fresh is not None and message.fresh != version:
        raise UserError(f"factors of version {message.fresh}; expected {version}")
    expected = flat(held)
    for name, value in message.tensors.items():
        if name not in expected or value.shape != expected[name].shape:
            raise UserError(f"the coordinator's {worded(name)} does not fit the model")
        if not torch.isfinite(value).all():
            raise UserError(f"the coordinator's {worded(name)} is not finite")
    _check_ledger(message.ledger, version, layers)


def _check_ledger(ledger: Ledger, version: int, layers: Mapping[str, LayerShape]) -> None:
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
        for name, w in increment.items():
            if name not in layers or w.shape != (layers[name].out, layers[name].inp):
                raise UserError(f"the coordinator's increment of {name[:80]!r} does not fit")
            if not all(torch.isfinite(part).all() for part in w.parts.values()):
                raise UserError(f"the coordinator's increment of {name[:80]!r} is not finite")
