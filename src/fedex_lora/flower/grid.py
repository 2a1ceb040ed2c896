"""Messages through Flower's grid: one array of bytes each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedex_lora.engines.remote.courier import Failed
from fedex_lora.errors import ProtocolError
from fedex_lora.federation.header import WORDS
from fedex_lora.flower.bounds import TOO_LARGE, bound_replies

_KEY = "blob"
_ENVELOPE = 1 << 20  # bytes of Flower's own around a message
_REASONS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "it cannot load the app; is fedex-lora[flower] installed?",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its program failed; its own log says why",
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply in time (federation.round_timeout)",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply did not arrive whole",
    ErrorCode.NODE_UNAVAILABLE: "the connection to it was lost",
    ErrorCode.INVALID_FAB: "it refuses the app that it was sent",
    ErrorCode.CLIENT_APP_CRASHED: "its client process died",
}

_MAY_MEND = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


def pack(blob: bytes) -> RecordDict:
    """A record with the blob as one array; each array costs some 30 ms, whatever its size."""
    array = Array("uint8", (len(blob),), "safetensors", blob)
    return RecordDict({_KEY: ArrayRecord({_KEY: array})})


def unpack(content: RecordDict) -> bytes:
    """The inverse of `pack`.

    Raises:
        UserError: It is no such record.
    """
    try:
        return content.array_records[_KEY][_KEY].data
    except (LookupError, AttributeError, TypeError):
        raise ProtocolError("a message of another program") from None


class FlowerCourier:
    """Nodes are SuperNodes, by the text of their number.

    Args:
        keys: The clients' names by public key, as PEM; empty where nodes have no keys.
    """

    def __init__(self, grid: Grid, keys: Mapping[bytes, str] | None = None) -> None:
        self._grid, self._keys = grid, keys or {}
        self._owners: dict[str, str] = {}
        self._most = WORDS.whole
        bound_replies(lambda: self._most + _ENVELOPE)

    def bound(self, most: int) -> None:
        """From now on no larger reply is taken in, in bytes."""
        self._most = most

    def nodes(self) -> list[str]:
        """Those connected now, by the SuperLink's account."""
        nodes = list(self._grid.get_nodes())
        for node in nodes:
            if self._keys:  # the SuperLink has checked that the node has the private key
                self._owners[str(node.node_id)] = self._keys.get(node.public_key, "?")
        return [str(node.node_id) for node in nodes]

    def owner(self, node: str) -> str | None:
        """The client by its node's key; None without keys."""
        return self._owners.get(node)

    def send(self, node: str, blob: bytes, round: int, seconds: float) -> str | Failed:
        """Pushes one message. The time to live is Flower's: without one a client that hangs blocks
        its node."""
        message = Message(
            pack(blob),
            dst_node_id=int(node),
            message_type=MessageType.TRAIN,
            group_id=str(round),
            ttl=seconds,
        )
        tickets = list(self._grid.push_messages([message]))
        if not tickets or not tickets[0]:
            return Failed("Flower did not take the message", gone=True)
        return tickets[0]

    def collect(self, tickets: Sequence[str]) -> list[tuple[str, bytes | Failed]]:
        """Replies by what they reply to: errors made by the SuperLink bear its own number."""
        if not tickets:
            return []
        replies = self._grid.pull_messages(list(tickets))
        return [(m.metadata.reply_to_message_id, _opened(m)) for m in replies]


def _opened(message: Message) -> bytes | Failed:
    if message.has_error():
        code = message.error.code
        reason = _REASONS.get(code, f"Flower's error {code}")
        if TOO_LARGE in (message.error.reason or ""):
            reason = TOO_LARGE
        return Failed(reason, gone=code in _MAY_MEND)
    try:
        return unpack(message.content)
    except ProtocolError as error:
        return Failed(str(error))
