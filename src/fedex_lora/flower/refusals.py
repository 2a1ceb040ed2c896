"""Who may speak to the server as a client, and why somebody else may not: said on both sides.

Flower itself asks whether a node's key is registered, and tells a refused client no reason. Here
the folder of the institutions' public keys decides, at every request: a key that is taken out of it
is refused at once. Reasons are printed here, and sent to the client, whose SuperNode shows them.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode
from binascii import Error
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import ApiErrorCode

REVOKED = "revoked"  # the folder of keys that were taken out, beside that of the others
_OFTEN = 1.0  # seconds between two looks at the folder
_SELDOM = 60.0  # seconds between two equal lines: clients try again and again
_ACTIVATE = "/v1/fleet/activate-node"

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Any, Send], Awaitable[None]]


def known_keys(clients: Path) -> dict[bytes, str]:
    """Names of the institutions by public key, as PEM; from `clients`/NAME/key.pub."""
    found = {}
    for file in sorted(clients.glob("*/key.pub")):
        try:
            key = serialization.load_ssh_public_key(file.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm):
            continue  # nobody has it
        pem = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found[pem] = file.parent.name
    return found


class Keys:
    """The institutions' public keys, as they were on disk a second ago.

    Args:
        clients: Their folder; None where nodes have no keys.
    """

    def __init__(self, clients: Path | None) -> None:
        self.clients = clients
        self._looked = -_OFTEN
        self._known: dict[bytes, str] = {}
        self._revoked: dict[bytes, str] = {}

    def name(self, key: bytes) -> str | None:
        """Whose key it is; None for one that may not take part."""
        now = time.monotonic()
        if self.clients is not None and now - self._looked >= _OFTEN:
            self._known = known_keys(self.clients)
            self._revoked = known_keys(self.clients.with_name(REVOKED))
            self._looked = now
        return self._known.get(key)

    def revoked(self, key: bytes) -> str | None:
        """Whose key it was."""
        return self._revoked.get(key)


def admitting(app: Asgi, keys: Keys, say: Callable[[str], object] = print) -> Asgi:
    """The same app for the institutions' nodes, and a reason for all others.

    Args:
        say: Is told of clients that come, go, or are refused, each reason once a minute.
    """
    told: dict[str, float] = {}

    def tell(text: str) -> None:
        now = time.monotonic()
        if now - told.get(text, -_SELDOM) >= _SELDOM and len(told) < 1000:
            told[text] = now
            say(text)

    async def admitted(scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope.get("headers", ())}
        key, where = _key(headers), (scope.get("client") or ["?"])[0]
        name = keys.name(key)
        if keys.clients is not None and name is None:
            was = keys.revoked(key)
            tell(f"refused {was or 'a client'} at {where}: {_unknown(was)}")
            await _refuse(send, scope["path"], _unknown(was))
            return
        swallowed = False

        async def look(message: MutableMapping[str, Any]) -> None:
            nonlocal swallowed
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    why = _why(headers, message["status"])
                    tell(f"refused {name or 'a client'} at {where}: {why}")
                    if scope["path"] == _ACTIVATE:
                        swallowed = True
                        await _refuse(send, _ACTIVATE, why)
                elif scope["path"] == _ACTIVATE and name is not None:
                    say(f"{name} is connected, from {where}")
                elif scope["path"].endswith("/deactivate-node") and name is not None:
                    say(f"{name} has left")
            if not swallowed:
                await send(message)

        await app(scope, receive, look)

    return admitted


def _unknown(was: str | None) -> str:
    if was is not None:
        return "its key was revoked (deploy revoke)"
    return "its key is none of those that `deploy init` or `deploy add` made here"


def _why(headers: Mapping[str, str], status: int) -> str:
    off = _clock(headers)
    if off is not None and not -TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE < off < (
        SYSTEM_TIME_TOLERANCE
    ):
        way = "ahead of" if off > 0 else "behind"
        # to tens of seconds: else each try would be another line
        return f"its clock is some {abs(round(off, -1)):.0f} s {way} the server's"
    if status == 412:
        return (
            "a node with this key is connected already: does `deploy client` run twice, here or "
            "elsewhere? (one that was killed counts as connected for up to a minute)"
        )
    return f"status {status}; Flower's log has more"


async def _refuse(send: Send, path: str, why: str) -> None:
    """A refusal whose text the client's SuperNode shows; one that runs already ends itself."""
    status = 412 if path == _ACTIVATE else 401
    code = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    body = json.dumps({"code": code, "detail": "refused", "extra": f"refused: {why}"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _key(headers: Mapping[str, str]) -> bytes:
    try:
        return b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""), validate=True)
    except (Error, ValueError):
        return b"?"


def _clock(headers: Mapping[str, str]) -> float | None:
    """Seconds by which a client's clock is ahead; None if it did not say."""
    try:
        signed = datetime.fromisoformat(headers[TIMESTAMP_HEADER])
        return (signed - datetime.now(UTC)).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
