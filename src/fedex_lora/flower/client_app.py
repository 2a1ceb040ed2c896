"""Flower's client app: a process for every message, so model and rows are loaded for each."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedex_lora.data.partition import client_names
from fedex_lora.engines.chosen import secure_settings
from fedex_lora.engines.private.begin import PRIVACY, own_account
from fedex_lora.engines.remote.asked import run_of
from fedex_lora.engines.remote.audit import FILE as AUDIT
from fedex_lora.engines.remote.audit import Audit
from fedex_lora.engines.remote.consent import FILE as RUNS
from fedex_lora.engines.remote.consent import Consent, Undecided
from fedex_lora.engines.remote.site import (
    Institution,
    bring_to_life,
    handle,
    handle_without_model,
    refused,
    unable,
    undecided,
)
from fedex_lora.engines.remote.summing import Keeper, needs_model
from fedex_lora.engines.setup import roster, set_up_client, surroundings
from fedex_lora.errors import ProtocolError, show_rows
from fedex_lora.federation.header import first_of
from fedex_lora.federation.secure.messages import MESSAGES
from fedex_lora.flower.deploy.roster import signer
from fedex_lora.flower.grid import pack, unpack
from fedex_lora.flower.memory import SealedMemory
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.rundir import versions

app = ClientApp()
ROUND_KEY = "round.key"  # in a client's folder, see `memory`
log = logging.getLogger("fedex_lora")


@app.train()
def answer(message: Message, context: Context) -> Message:
    """One message of the coordinator, one reply."""
    with in_time(message, context):
        try:
            blob = unpack(message.content)
        except ProtocolError:
            blob = b""  # of a program that is not run here; it is logged as any other message
        reply = reply_to(blob, context.node_config, context.run_config, context.state)
        return Message(pack(reply), reply_to=message)


@contextmanager
def in_time(message: Message, context: Context) -> Iterator[None]:
    """Ends this process where it takes longer than the message is good for.

    A SuperNode takes no other message before a process has answered or died, so one that hangs
    would keep its client out of all later rounds. In a simulation the process serves many.
    """
    alarm = hasattr(signal, "SIGALRM") and "client" in context.node_config
    if alarm:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's doing, whatever hangs
        signal.alarm(math.ceil(message.metadata.ttl))
    yield
    if alarm:
        signal.alarm(0)


def reply_to(
    blob: bytes,
    node: Mapping[str, Any],
    run: Mapping[str, Any],
    state: RecordDict | None = None,
) -> bytes:
    """The reply of the client that this node's own configuration describes.

    Args:
        node: `client` (its name), `recipe`, `data`, `home`, `runs`, `ask`, `show-rows`,
            `epsilon`: all from this node's own disk and its own command line.
        run: What the coordinator configured; heard only in a simulation, where both are one.
        state: Flower's, of this run at this node.
    """
    place = dict(node) if "client" in node else _simulated(node, run)
    name, home = str(place["client"]), Path(str(place["home"]))
    audit = Audit(None if "partition-id" in node else home / AUDIT)
    about: dict[str, Any] = {}
    try:
        if not blob:
            raise ProtocolError("a message of another program than fedex-lora")
        about = dict(first_of(blob)["about"])
        _note(audit, "in", about, about, blob)
        consent = None if "partition-id" in node else _consent(place)
        reply = _reply(blob, about, place, consent, RecordDict() if state is None else state)
    except Exception as error:
        if not about:
            _note(audit, "in", about, about, blob)
        reply = unable(about, name, error)
    _note(audit, "out", first_of(reply)["about"], about, reply)
    return reply


def _note(
    audit: Audit, direction: str, said: Mapping[str, Any], asked: Mapping[str, Any], blob: bytes
) -> None:
    """A line of the audit log; `asked` is the coordinator's message, `said` this one."""
    version, kind = asked.get("version"), asked.get("kind")
    trains = kind in ("round", "secure")
    round = version + 1 if type(version) is int and trains else version
    round = 0 if kind == "hello" else round
    outcome = str(said.get("reason", "received" if direction == "in" else "answered"))
    run = asked.get("federation")
    audit.write(direction, said.get("kind"), run, round, blob, outcome, "coordinator")


def _reply(
    blob: bytes,
    about: Mapping[str, Any],
    place: Mapping[str, Any],
    consent: Consent | None,
    state: RecordDict,
) -> bytes:
    """The reply to one message, if this client's operator wants it to be answered.

    Raises:
        UserError, or anything: It cannot be answered.
    """
    name, kind = str(place["client"]), about.get("kind")
    if kind == "refused":
        return refused(about, name)
    show_rows(bool(place.get("show-rows")))
    recipe = load_recipe(Path(str(place["recipe"])))
    try:
        if consent is not None and kind == "hello":
            consent.greeted(run_of(about))
        elif consent is not None:
            consent.turn(run_of(about), most_turns(recipe))
    except Undecided as error:
        if error.first and consent is not None and not consent.ask:
            log.warning(
                "run %s: took part in %d, which is as many runs as it was told; to take part in "
                "this one: fedex-lora deploy allow %s",
                run_of(about)[:8],
                len(consent.joined()),
                shlex.quote(str(place["home"])),
            )
        return undecided(about, name, str(error))
    with surroundings(recipe):
        run = str(about.get("federation"))  # looked at when the message is
        keeper = _keeper(place, recipe, state)
        if keeper is None or needs_model(about):
            reply = handle(blob, institution(place, recipe, run, keeper))
        else:
            reply = handle_without_model(blob, keeper)
    if consent is not None and kind == "final" and not consent.ask and not consent.left():
        log.info(
            "took part in %d, which is as many runs as it was told; for another one: "
            "fedex-lora deploy allow %s",
            len(consent.joined()),
            shlex.quote(str(place["home"])),
        )
    return reply


def most_turns(recipe: Recipe) -> int:
    """How many messages of a run are answered: its rounds and the scores of their models, both
    repeated where the coordinator or a connection failed, and the last model. A round in which only
    sums are seen takes more of them."""
    each = 1 if recipe.privacy.secure_aggregation is None else MESSAGES
    return 4 * each * recipe.federation.rounds + 10


def _consent(place: Mapping[str, Any]) -> Consent:
    path = Path(str(place["home"])) / RUNS
    return Consent(path, int(place.get("runs", 1)), bool(place.get("ask")))


def _keeper(place: Mapping[str, Any], recipe: Recipe, state: RecordDict) -> Keeper | None:
    """Of this client's secrets, where only sums are to be seen. In a simulation nobody has keys."""
    secure, name, home = secure_settings(recipe), str(place["client"]), Path(str(place["home"]))
    if secure is None:
        return None
    memory = SealedMemory(state, home / f"{name}-{ROUND_KEY}")
    rounds, signs = recipe.federation.rounds, signer(home)
    return Keeper(name, home / "cache", rounds, secure, memory, signs)


def institution(
    place: Mapping[str, Any], recipe: Recipe, run: str = "", keeper: Keeper | None = None
) -> Institution:
    """The client, brought to life.

    Args:
        run: The run that it takes a turn in.
        keeper: Of its secrets.

    Raises:
        UserError: Its model or rows cannot be used.
    """
    name = str(place["client"])
    file = Path(str(place["data"])) if place.get("data") else None
    home = Path(str(place["home"]))
    most = float(place["epsilon"]) if "epsilon" in place else None
    account = own_account(recipe, home / str(place.get("account", PRIVACY)), file, run, most)
    federation = set_up_client(recipe, name, file)
    return bring_to_life(federation, name, home / "cache", versions(), account, keeper)


def _simulated(node: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """In a simulation the nodes are numbered; the recipe says who is who, and has the rows."""
    os.chdir(str(run["folder"]))
    path = Path(str(run["recipe"]))
    names = simulated_names(load_recipe(path))
    name = names[int(node["partition-id"])]
    home = path.parent / "simulated"  # of all of them
    return {"client": name, "recipe": path, "home": home, "account": f"{name}-{PRIVACY}"}


def simulated_names(recipe: Recipe) -> list[str]:
    """Names of the clients in the order of the nodes' numbers; those of the local engine."""
    return roster(recipe) or client_names(recipe.federation.clients)
