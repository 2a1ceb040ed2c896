"""Flower's nodes in this process: a Grid that hands messages to functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message], Message]


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made: in a deployment Flower's process says whose they are."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)


class InProcess(Grid):
    """Nodes 10, 11, …; replies arrive in the opposite order. `sent` is what was sent."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self.clients = {10 + i: client for i, client in enumerate(clients)}
        self.sent: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = sorted(messages, key=lambda m: m.metadata.dst_node_id, reverse=True)
        self.sent += sent
        return [self.clients[m.metadata.dst_node_id](m) for m in sent]

    def set_run(self, run: Any) -> None: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def push_messages(self, messages: Any) -> Any: ...
    def pull_messages(self, message_ids: Any) -> Any: ...

    @property
    def run(self) -> Any: ...


def reply(message: Message, tensors: Mapping[str, Any], **metrics: float) -> Message:
    content = {
        "arrays": ArrayRecord(dict(tensors)),
        "metrics": MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


def failure(message: Message, why: str) -> Message:
    return Message(Error(code=2, reason=why), reply_to=message)


def served(app: Any, partitions: int, run_config: Mapping[str, Any]) -> list[Client]:
    """A ClientApp as nodes with "partition-id" 0, 1, …"""

    def node(partition: int) -> Client:
        context = Context(
            run_id=1,
            node_id=partition,
            node_config={"partition-id": partition, "num-partitions": partitions},
            state=RecordDict(),
            run_config=dict(run_config),
        )
        return lambda message: app(message, context)

    return [node(i) for i in range(partitions)]
