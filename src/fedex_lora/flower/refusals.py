"""Says at the server which client Flower refused, and why: Flower itself tells the client alone."""

from __future__ import annotations

import time
from base64 import b64decode
from binascii import Error
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

_SELDOM = 60.0  # seconds between two equal lines: clients try again and again

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Any, Send], Awaitable[None]]


def known_keys(clients: Path) -> dict[bytes, str]:
    """Names of the institutions by public key, as PEM; from `clients`/NAME/key.pub."""
    found = {}
    for file in sorted(clients.glob("*/key.pub")):
        key = serialization.load_ssh_public_key(file.read_bytes())
        pem = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found[pem] = file.parent.name
    return found


def telling(app: Asgi, keys: Mapping[bytes, str], say: Callable[[str], object] = print) -> Asgi:
    """The same app; `say` is told of clients that are refused, each reason once a minute."""
    told: dict[str, float] = {}

    async def watched(scope: Scope, receive: Any, send: Send) -> None:
        async def look(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                text = _refused(scope, message["status"], keys)
                now = time.monotonic()
                if now - told.get(text, -_SELDOM) >= _SELDOM and len(told) < 1000:
                    told[text] = now
                    say(text)
            await send(message)

        fleet = scope["type"] == "http" and scope["path"].startswith("/v1/fleet/")
        await app(scope, receive, look if fleet else send)

    return watched


def _refused(scope: Scope, status: int, keys: Mapping[bytes, str]) -> str:
    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope.get("headers", ())}
    where = (scope.get("client") or ["?"])[0]
    name = keys.get(_key(headers))
    if name is None and _key(headers):
        return f"refused a client at {where}: its key is none of those that `deploy init` made"
    off = _clock(headers)
    who = f"refused {'a client' if name is None else name} at {where}"
    if off is not None and not -TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE < off < (
        SYSTEM_TIME_TOLERANCE
    ):
        way = "ahead of" if off > 0 else "behind"
        # to tens of seconds: else each try would be another line
        return f"{who}: its clock is some {abs(round(off, -1)):.0f} s {way} this machine's"
    return (
        f"{who}: status {status}; one that was killed is refused until it counts as offline, "
        "up to a minute"
    )


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
