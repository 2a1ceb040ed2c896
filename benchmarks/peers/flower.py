"""A round of an app as FlowerTune has them: Flower's simulation, plain FedAvg, PEFT, the Trainer.

Every client reads the model anew in every round, takes the global adapter, trains and sends its
own; Flower's strategy averages array by array.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.peers.common import Asked, Ended, adapted, bases, effective, scale, serve, train
from fedex_lora.engines.setup import Federation

Done = tuple[list[Any], ArrayRecord]
"""The contents of the replies to a round, and their mean."""
ROOT = Path(__file__).resolve().parents[2]
client = ClientApp()


@cache
def federation(data: str, threads: int) -> Federation:
    """The rows; a process of Ray's keeps them, as FlowerTune's apps do."""
    return Asked(Path(data), threads, 1).federation()


@client.train()
def turn(message: Message, context: Context) -> Message:
    """A client's."""
    given, arrays = message.content["config"], message.content["arrays"]
    assert isinstance(given, ConfigRecord) and isinstance(arrays, ArrayRecord)
    whole = federation(str(given["data"]), int(str(given["threads"])))
    rows = list(whole.clients.values())[int(context.node_config["partition-id"])]
    model = adapted(whole)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    train(model, rows, whole)
    sent: dict[str, Any] = {
        "arrays": ArrayRecord(get_peft_model_state_dict(model)),
        "metrics": MetricRecord({"num-examples": len(rows)}),
    }
    return Message(RecordDict(sent), reply_to=message)


class Paced(FedAvg):
    """FedAvg, whose rounds begin when they are asked for."""

    def __init__(self, asked: Queue[None], done: Queue[Done]) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        self.asked, self.done = asked, done

    def configure_train(self, *args: Any, **given: Any) -> Iterable[Message]:
        """Waits first."""
        self.asked.get()
        return super().configure_train(*args, **given)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Hands over what it was made of, and what was made."""
        kept = list(replies)
        arrays, metrics = super().aggregate_train(server_round, kept)
        assert arrays is not None
        self.done.put(([reply.content for reply in kept], arrays))
        return arrays, metrics


def in_turn(connection: Connection, asked: Asked) -> None:
    """Flower's simulation in this process, Ray's processes below it."""
    os.environ |= {"PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
    begin: Queue[None] = Queue()
    done: Queue[Done] = Queue()
    whole = federation(str(asked.data), asked.threads)
    model = adapted(whole)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        Paced(begin, done).start(
            grid=grid,
            initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
            num_rounds=asked.rounds,
            train_config=ConfigRecord({"data": str(asked.data), "threads": asked.threads}),
        )

    Thread(
        target=serve, args=(connection, rounds(model, scale(whole), begin, done)), daemon=True
    ).start()
    resources = {"client_resources": {"num_cpus": asked.threads, "num_gpus": 0.0}}
    run_simulation(server, client, len(whole.clients), backend_config=resources)


def rounds(
    model: PeftModel, scale: float, begin: Queue[None], done: Queue[Done]
) -> Iterator[Ended]:
    """Each from where the last one ended; the base is what it was."""
    own, state = bases(model), get_peft_model_state_dict(model)
    while True:
        begin.put(None)
        replies, averaged = done.get()
        start = effective(own, state, scale)
        ends = [effective(own, reply["arrays"].to_torch_state_dict(), scale) for reply in replies]
        rows = [int(reply["metrics"]["num-examples"]) for reply in replies]
        state = averaged.to_torch_state_dict()
        yield Ended(start, ends, rows, {"": effective(own, state, scale)})
