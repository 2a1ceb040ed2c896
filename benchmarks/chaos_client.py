"""Flower's client app of rehearsals: the real one, sabotaged in one round at one client.

The file that $FEDEX_LORA_CHAOS names says which: {"client", "round", "what"}; without it nothing is
spoiled. One that "waits" makes the file at-work beside it, and goes on when that is gone. Messages
of `flower_echo` are answered as that does.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from benchmarks import flower_echo
from benchmarks.spoil import about, parts, whole
from fedex_lora.errors import UserError
from fedex_lora.flower import client_app
from fedex_lora.flower.grid import pack, unpack

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """The client's reply, or what the plan makes of it."""
    if "wanted" in message.content.config_records:
        return flower_echo.answer(message)
    what = planned(message)
    if not what:
        return client_app.answer(message, context)
    with client_app.in_time(message, context):
        if what == "process killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raises":
            raise RuntimeError("sabotage")
        if what == "hangs":
            time.sleep(3600)
        if what == "waits":
            wait(Path(os.environ["FEDEX_LORA_CHAOS"]).with_name("at-work"))
        blob = unpack(message.content)
        reply = client_app.reply_to(blob, context.node_config, context.run_config)
        return Message(pack(damaged(reply, what)), reply_to=message)


def planned(message: Message) -> str:
    """What is planned for this message; nothing where it is no round of ours."""
    file = Path(os.environ["FEDEX_LORA_CHAOS"])
    try:
        plan, said = json.loads(file.read_text()), about(unpack(message.content))
    except (FileNotFoundError, UserError):
        return ""
    now = said.get("client") == plan["client"] and said.get("version", -1) + 1 == plan["round"]
    return plan["what"] if now and said["kind"] == "round" else ""


def wait(mark: Path) -> None:
    """Says that it is at work, and waits until somebody takes that away."""
    mark.touch()
    while mark.exists():
        time.sleep(0.1)


def damaged(reply: bytes, what: str) -> bytes:
    """The reply, spoiled."""
    tensors, meta = parts(reply)
    factors = {n: t for n, t in tensors.items() if n.startswith("A/")}
    if what == "sends NaN":
        tensors |= {n: torch.full_like(t, float("nan")) for n, t in factors.items()}
    if what == "wrong shapes":
        tensors |= {n: t.T for n, t in factors.items()}
    if what == "10 times the size":
        tensors |= {f"{n}/{i}": t for n, t in factors.items() for i in range(2000)}
    if what == "another run's round":
        meta["about"]["federation"] = "0" * 32
    return whole(tensors, meta)
