"""Flower's client app: a process for every message, so model and rows are loaded for each."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedex_lora.data.partition import client_names
from fedex_lora.engines.site import Institution, handle, unfit
from fedex_lora.errors import UserError, Withheld
from fedex_lora.flower.grid import pack, unpack
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import load_recipe
from fedex_lora.rundir import versions
from fedex_lora.setup import roster, set_up_client

app = ClientApp()
log = logging.getLogger("fedex_lora")


@app.train()
def answer(message: Message, context: Context) -> Message:
    """One message of the coordinator, one reply."""
    with in_time(message, context):
        reply = reply_to(unpack(message.content), context.node_config, context.run_config)
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


def reply_to(blob: bytes, node: Mapping[str, Any], run: Mapping[str, Any]) -> bytes:
    """The reply of the client that this node's own configuration describes.

    Args:
        node: `client` (its name), `recipe`, `data`, `cache`: all from this node's own disk.
        run: What the coordinator configured; heard only in a simulation, where both are one.
    """
    place = dict(node) if "client" in node else _simulated(node, run)
    name = str(place["client"])
    try:
        client = institution(place)
    except Withheld as error:
        log.error("%s", error)
        return unfit(blob, name, "its data cannot be used; its own log says why")
    except UserError as error:
        log.error("%s", error)
        return unfit(blob, name, str(error))
    return handle(blob, client)


def institution(place: Mapping[str, Any]) -> Institution:
    """The client, brought to life.

    Raises:
        UserError: Its recipe, model or rows cannot be used.
    """
    recipe, name = load_recipe(Path(str(place["recipe"]))), str(place["client"])
    file = Path(str(place["data"])) if place.get("data") else None
    federation = set_up_client(recipe, name, file)
    return Institution(
        name,
        Path(str(place["cache"])),
        recipe,
        federation.task,
        federation.model,
        federation.settings,
        federation.clients[name],
        federation.validation.get(name),
        federation.initial,
        versions(),
    )


def _simulated(node: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """In a simulation the nodes are numbered; the recipe says who is who, and has the rows."""
    os.chdir(str(run["folder"]))
    path = Path(str(run["recipe"]))
    names = simulated_names(load_recipe(path))
    name = names[int(node["partition-id"])]
    return {"client": name, "recipe": path, "cache": path.parent / "simulated"}


def simulated_names(recipe: Recipe) -> list[str]:
    """Names of the clients in the order of the nodes' numbers; those of the local engine."""
    return roster(recipe) or client_names(recipe.federation.clients)
