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
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.own_loop import own_loop
from fedex_lora.engines.private.begin import plan_of, private_trainer
from fedex_lora.engines.remote.asked import addressed, common, field, identity_of
from fedex_lora.engines.remote.cache import Cache, Held
from fedex_lora.engines.remote.catching_up import Lacks, caught_up, least, load_held
from fedex_lora.engines.remote.summing import Keeper, ProcessMemory, needs_model, respond
from fedex_lora.engines.remote.wire import (
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
from fedex_lora.engines.transforms import clip, clipped
from fedex_lora.engines.turn import Train, Transform, take_turns, turn_of
from fedex_lora.errors import UserError, for_others
from fedex_lora.federation.codec import decode_update, encode_about, encode_update, read_about
from fedex_lora.federation.messages import Update, flat
from fedex_lora.federation.noise import told_bound
from fedex_lora.federation.secure.messages import limit
from fedex_lora.federation.secure.sums import Summand, summand
from fedex_lora.federation.secure.told import origin
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import own_part
from fedex_lora.recipe import Recipe

if TYPE_CHECKING:
    from fedex_lora.engines.private.account import Spending

log = logging.getLogger(__name__)


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
        keeper: Of its secrets, where the coordinator is to see sums alone.
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
    keeper: Keeper | None = None


def bring_to_life(
    federation: Federation,
    name: str,
    cache: Path,
    versions: Mapping[str, str | None],
    account: Spending | None = None,
    keeper: Keeper | None = None,
) -> Institution:
    """The client of that name, of what `set_up_client` made of its recipe and its rows.

    Args:
        account: Where it takes down what it spends of its privacy; by default in memory.
        keeper: Of its secrets; by default in memory too, and without signatures.
    """
    recipe, task = federation.recipe, federation.task
    settings = replace(federation.settings, clients=(name,))
    plan = plan_of(recipe, settings, {name: len(federation.clients[name])})
    train: Train = own_loop(recipe) or HFTrainer(
        task, recipe.trainer_arguments, proximal=recipe.federation.proximal
    )
    if plan is not None:
        train = private_trainer(recipe, task, plan, account)
    if keeper is None and settings.secure is not None:
        rounds = recipe.federation.rounds
        keeper = Keeper(name, cache, rounds, settings.secure, ProcessMemory())
    level = recipe.privacy.client_level
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
        clipped(recipe) if level is None else clip(level.clip),
        keeper,
    )


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
        if kind == "secure":
            return _add(blob, about, institution)
        if kind in ("round", "evaluate", "final"):
            return _turn(blob, about, institution)
        raise UserError(f"a message of unknown kind {str(kind)[:40]!r}; install the same version")
    except Lacks as lacks:
        log.warning("%s %s; asking the coordinator for the rest", institution.name, lacks)
        return _say(about, institution.name, "lacks", version=lacks.version)
    except Exception as error:
        return unable(about, institution.name, error)


def handle_without_model(blob: bytes, keeper: Keeper) -> bytes:
    """The reply to a message for which `summing.needs_model` is false."""
    about: dict[str, Any] = {}
    try:
        about = read_about(blob, limit())
        return respond(about, keeper)
    except Exception as error:
        return unable(about, keeper.name, error)


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


def _say(about: Mapping[str, Any], client: str, kind: str, **more: object) -> bytes:
    return encode_about({**common(about, client), "kind": kind, **more})


def _hello(about: Mapping[str, Any], institution: Institution) -> bytes:
    if about.get("protocol") != PROTOCOL:
        raise UserError(
            f"speaks protocol {PROTOCOL}, the coordinator {str(about.get('protocol'))[:20]}; "
            "install the same version of fedex-lora on both sides"
        )
    theirs = Facts(field(about, "agreed", dict), field(about, "digests", dict))
    recipe, stage = institution.recipe, institution.stage
    mine = facts(recipe, stage.task, stage.model, institution.initial)
    if different := mine.differences(theirs):
        raise UserError(
            f"not the coordinator's recipe: {'; '.join(different)}. Take the coordinator's recipe "
            "or agree with it on another"
        )
    identity = identity_of(about)
    held = load_held(Cache(_folder(institution, identity)), identity, institution.settings)
    rows = len(institution.rows)
    log.info("run %s: greeted, ready with %d rows", identity.federation[:8], rows)
    return _say(
        about,
        institution.name,
        "hello",
        rows=len(institution.rows),
        validation=len(institution.validation or ()),
        held=least(institution.settings) if held is None else held.version,
        versions=dict(institution.versions),
        time=time.time(),
    )


def _agreed(about: Mapping[str, Any], institution: Institution) -> Identity:
    """The run of a message that is for this client, by the recipe that was agreed on."""
    identity = addressed(about, institution.name, institution.recipe.federation.rounds)
    if about.get("recipe") != agreement(agreed(institution.recipe, institution.stage.task)):
        raise UserError("the recipe has changed since the run began; begin a new run")
    return identity


def _add(blob: bytes, about: Mapping[str, Any], institution: Institution) -> bytes:
    """One step of a round in which the coordinator sees sums alone."""
    keeper = institution.keeper
    if keeper is None:
        raise UserError("asked for a sum, but its own recipe has no privacy.secure_aggregation")
    if not needs_model(about):
        return respond(about, keeper)
    identity, settings = _agreed(about, institution), institution.settings
    cache = Cache(_folder(institution, identity))

    def added(widths: Mapping[str, int]) -> Summand:
        held = caught_up(blob, about, cache, identity, settings, institution.initial)
        cache.save(held)
        update = _update(institution, held, about["ask"].get("clip"))
        start = origin(settings, held.adapter, held.ledger)
        return replace(summand(settings, widths, held.adapter, update), start=start)

    return respond(about, keeper, added)


def _turn(blob: bytes, about: Mapping[str, Any], institution: Institution) -> bytes:
    """Catches up; then trains, or scores what it was sent."""
    if about["kind"] == "round" and institution.keeper is not None:
        raise UserError(
            "asked for its update itself; by its own recipe only sums are shown "
            "(privacy.secure_aggregation)"
        )
    identity = _agreed(about, institution)
    cache = Cache(_folder(institution, identity))
    held = caught_up(blob, about, cache, identity, institution.settings, institution.initial)
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


def _size(blob: bytes) -> str:
    return f"{len(blob) / 1e3:.1f} kB" if len(blob) < 1e6 else f"{len(blob) / 1e6:.1f} MB"


def _train(
    about: Mapping[str, Any], institution: Institution, held: Held, cache: Cache
) -> tuple[bytes, Update]:
    """The update's message, and the update; own factors are put where they are kept."""
    settings, client, start = institution.settings, institution.name, held.adapter
    update = _update(institution, held, about.get("clip"))
    said = common(about, client) | {"kind": "update"}
    blob = encode_update(update, start, settings.wire_dtype, said)
    assignment = settings.method.assignment
    if assignment.own and not assignment.dealt:
        # with a lossy wire, what the server decodes counts here too
        decoded = decode_update(blob, start, client).tensors
        end = own_part(settings, {**flat(start), **update.kept, **decoded})
        cache.save(replace(held, ends={**held.ends, update.round: end}))
    return blob, update


def _update(institution: Institution, held: Held, bound: object) -> Update:
    """What the client trains in one turn.

    Args:
        bound: Of its update, where it follows the clients' norms; None where it was told none.
    """
    settings, rows = institution.settings, institution.rows
    transform, level = institution.transform, institution.recipe.privacy.client_level
    if bound is not None:
        transform = clip(told_bound(bound, level is not None and level.adaptive))
    turn = turn_of(settings, institution.name, held.version + 1, rows, held.adapter)
    (update,) = take_turns(
        institution.stage, institution.train, [turn], held.ledger, settings, transform
    )
    return update


def _folder(institution: Institution, identity: Identity) -> Path:
    return institution.cache / identity.federation / institution.name
