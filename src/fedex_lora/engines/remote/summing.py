"""A client's part in a round in which the coordinator sees sums alone.

Only who trains needs model and rows. What the client then adds waits on its own disk until all have
agreed on sizes; its secrets wait in a `Memory`, and are gone when the round is over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedex_lora.engines.remote.asked import addressed, common, field
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import encode_about, encode_masked
from fedex_lora.federation.messages import Tensors
from fedex_lora.federation.secure.member import Added, Member
from fedex_lora.federation.secure.messages import Ask, Step
from fedex_lora.federation.secure.primitives import canonical
from fedex_lora.federation.secure.signer import Signer
from fedex_lora.federation.secure.sums import Summand
from fedex_lora.federation.settings import Secure

_FILE = "summand.safetensors"
log = logging.getLogger(__name__)


class Memory(Protocol):
    """Where secrets are between two messages, which two processes may answer."""

    def take(self) -> bytes | None:
        """What was kept last; it is there no more."""
        ...

    def keep(self, secrets: bytes) -> None:
        """Keeps this, in place of what was there."""
        ...


class ProcessMemory:
    """In this process, which answers all messages."""

    def __init__(self) -> None:
        self._secrets: bytes | None = None

    def take(self) -> bytes | None:
        found, self._secrets = self._secrets, None
        return found

    def keep(self, secrets: bytes) -> None:
        self._secrets = secrets


@dataclass(frozen=True)
class Keeper:
    """What a client has at hand between the messages of a round.

    Attributes:
        cache: Folder for what it is sent; one below it for every federation.
        rounds: Of its own recipe.
        secure: Of its own recipe.
        signer: Signs for it, and knows the others' signatures; None where nobody has keys.
    """

    name: str
    cache: Path
    rounds: int
    secure: Secure
    memory: Memory
    signer: Signer | None = None


def needs_model(about: Mapping[str, Any]) -> bool:
    """Whether a message is answered by who has model and rows at hand."""
    return about.get("kind") != "secure" or about.get("step") == "train"


def respond(about: Mapping[str, Any], keeper: Keeper, added: Added | None = None) -> bytes:
    """The reply to one message of such a round.

    Args:
        added: Trains; None where that is not asked.

    Raises:
        UserError: It cannot be answered, or would show more than a sum.
    """
    run = addressed(about, keeper.name, keeper.rounds).federation
    ask = Ask(cast(Step, field(about, "step", str)), field(about, "ask", dict))
    member, path = _recalled(keeper, run), keeper.cache / run / keeper.name / _FILE
    if ask.step == "keys":
        path.unlink(missing_ok=True)  # of a round that came to nothing

    def kept(widths: Mapping[str, int]) -> Summand:
        if added is None or not ask.trains:
            return _read(path)
        found = added(widths)
        _write(path, found)
        return found

    over = False
    try:
        answer = member.answer(ask, keeper.secure, kept, keeper.signer)
        over = ask.step == "open" and ask.about["sum"] == "numbers"
    finally:  # what was revealed is remembered, whatever came of it
        if not over:
            keeper.memory.keep(canonical({"run": run, "member": member.dump()}))
    if ask.step == "send":
        path.unlink(missing_ok=True)
    log.info("run %s, round %d: secure aggregation, %s", run[:8], about["version"] + 1, ask.step)
    said = {**common(about, keeper.name), "kind": "secure", "step": ask.step}
    said["answer"] = dict(answer.about)
    if answer.vector is None:
        return encode_about(said)
    return encode_masked(said, torch.from_numpy(answer.vector.view(np.int64)))


def _recalled(keeper: Keeper, run: str) -> Member:
    secrets = keeper.memory.take()
    known = {} if secrets is None else json.loads(secrets)
    return Member.load(known["member"]) if known.get("run") == run else Member(keeper.name)


def _write(path: Path, summand: Summand) -> None:
    """Its tensors by their places, on which the order in the sum depends."""
    tensors: Tensors = {str(i): t.contiguous() for i, t in enumerate(summand.tensors.values())}
    about = {"names": json.dumps([*summand.tensors]), "weight": repr(summand.weight)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, about)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}; make room there") from None


def _read(path: Path) -> Summand:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            names = json.loads(about["names"])
            tensors = {name: file.get_tensor(str(i)) for i, name in enumerate(names)}
            return Summand(tensors, float(about["weight"]))
    except (OSError, SafetensorError):
        raise UserError("what it trained in this round is gone; it sits this one out") from None
