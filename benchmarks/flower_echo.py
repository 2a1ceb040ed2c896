"""A Flower app that does nothing: the server sends every node so many bytes and gets so many back.

What such a round takes is Flower's own; `python -m benchmarks.flower_overhead` compares.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedex_lora.flower.grid import pack

server = ServerApp()
PATIENCE = 300.0  # seconds


def unequal(size: int) -> bytes:
    """So many bytes of which no piece is equal to another, made in no time."""
    blob = bytearray(size)
    for start in range(0, size - 16, 1 << 20):
        blob[start : start + 16] = os.urandom(16)
    return bytes(blob)


def answer(message: Message) -> Message:
    """As many bytes as were asked for; by `chaos_client`, for clients run no program but theirs."""
    wanted = message.content.config_records["wanted"]["up"]
    assert isinstance(wanted, int)
    return Message(pack(unequal(wanted)), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Times rounds; writes their seconds into a file."""
    config = context.run_config
    down, up, nodes = (int(config[name]) for name in ("down", "up", "nodes"))
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.5)
    seconds = []
    for round in range(int(config["rounds"])):
        blob, began = unequal(down), time.perf_counter()
        messages = [_message(blob, up, node, round) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=PATIENCE))
        assert len(replies) == nodes and not any(reply.has_error() for reply in replies)
        seconds.append(time.perf_counter() - began)
    Path(str(config["result"])).write_text(json.dumps(seconds))


def _message(blob: bytes, up: int, node: int, round: int) -> Message:
    content = pack(blob)
    content["wanted"] = ConfigRecord({"up": up})
    return Message(
        RecordDict(content),
        dst_node_id=node,
        message_type=MessageType.TRAIN,
        group_id=str(round + 1),
        ttl=PATIENCE,
    )
