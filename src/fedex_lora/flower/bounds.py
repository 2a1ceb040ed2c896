"""What one client's message may cost the coordinator, and whose reply it may be.

Flower 1.41 cuts messages into pieces of 5 MiB and sets no bound: not on a request, not on the
pieces of a message, and a node may put another's number under its reply (it would have to know that
number, and which message is to be answered). All three are closed here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.superlink.grid import http_grid
from flwr.superlink.servicer.fleet import fleet_handlers

from fedex_lora.flower.refusals import Asgi, Scope, Send

MOST_REQUEST = 8 << 20  # bytes of one request: a piece and what is around it
TOO_LARGE = "the reply is larger than it can be"


def bounded(app: Asgi, most: int = MOST_REQUEST) -> Asgi:
    """The same app, which takes no larger requests from clients."""

    async def bound(scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await app(scope, receive, send)
            return
        said = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            await _refuse(send)
            return
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:  # it did not say how long it is, or not the truth
                raise ConnectionError(f"a request of more than {most} bytes")
            return message

        await app(scope, counted, send)

    return bound


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"the request is too large\n"})


def check_senders() -> None:
    """Lets a node reply in its own name only."""
    push = fleet_handlers.push_messages

    def checked(request: PushMessagesRequest, state: Any) -> Any:
        own = request.node.node_id
        if any(message.metadata.src_node_id != own for message in request.messages_list):
            raise ValueError(f"node {own} replies in another's name")
        return push(request, state)

    fleet_handlers.push_messages = checked


def bound_replies(most: Callable[[], int]) -> None:
    """Takes in no more bytes of a reply than `most()`, whatever is waiting at the SuperLink."""

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        taken, lock = 0, threading.Lock()  # pieces are pulled by several threads

        def counted(object_id: str) -> bytes:
            nonlocal taken
            content = pull_object_fn(object_id)
            with lock:
                taken += len(content)
            if taken > most():
                raise ObjectPullError(object_id, TOO_LARGE)
            return content

        return pull_objects(object_ids, counted)

    http_grid.pull_objects = pull  # type: ignore[assignment]
