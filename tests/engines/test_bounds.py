"""What a client's requests and replies may cost the coordinator, and in whose name they come."""

import asyncio

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.superlink.grid import http_grid
from flwr.superlink.servicer.fleet import fleet_handlers

from fedex_lora.flower import bounds


def asked(path, chunks, headers=()):
    """(status, bytes that the app was given) of a request in chunks."""
    given, sent, left = [], [], list(chunks)

    async def app(scope, receive, send):
        while (message := await receive())["body"]:
            given.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": left.pop(0) if left else b""}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers)}
    try:
        asyncio.run(bounds.bounded(app, most=100)(scope, receive, send))
    except ConnectionError:
        return "cut", sum(given)
    return sent[0]["status"], sum(given)


def test_a_request_of_a_client_is_bounded_by_what_it_says_and_by_what_comes():
    assert asked("/v1/fleet/push-object", [b"x" * 60, b"x" * 40]) == (200, 100)
    assert asked("/v1/fleet/push-object", [b"x"], [(b"content-length", b"101")]) == (413, 0)
    assert asked("/v1/fleet/push-object", [b"x"], [(b"content-length", b"-1")]) == (413, 0)
    assert asked("/v1/fleet/push-object", [b"x" * 60, b"x" * 41]) == ("cut", 60)
    assert asked("/v1/runtime/push-object", [b"x" * 1000]) == (200, 1000)  # the coordinator's own


def test_a_node_replies_in_its_own_name_only(monkeypatch):
    pushed = []
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda request, state: pushed.append(1))
    bounds.check_senders()

    def reply(sender):
        message = Message(metadata=Metadata(src_node_id=sender))
        return PushMessagesRequest(node=Node(node_id=7), messages_list=[message])

    fleet_handlers.push_messages(reply(7), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="node 7 replies in another's name"):
        fleet_handlers.push_messages(reply(8), None)  # type: ignore[arg-type]
    assert pushed == [1]


def test_no_more_of_a_reply_is_taken_in_than_it_can_be(monkeypatch):
    monkeypatch.setattr(http_grid, "pull_objects", None)  # put back afterwards
    bounds.bound_replies(lambda: 25)
    pulled = []

    def piece(name):
        pulled.append(name)
        return bytes(10)

    pull = http_grid.pull_objects
    assert pull(["a", "b"], piece) == {"a": bytes(10), "b": bytes(10)}
    with pytest.raises(ObjectPullError, match="larger than it can be"):
        pull([str(i) for i in range(1000)], piece)
    assert len(pulled) < 20
