"""flower-superlink with the control paths closed to the network.

Flower 1.41 serves clients, the program that runs apps, and the control of runs on one port, and
asks for no credentials for the last two: whoever reaches the port could start a run, that is,
programs at the coordinator and at every client. Here only what clients need answers to others than
this machine.

Clients that are refused are named here too, see `refusals`.

Flower gives up on its database after five seconds. Large messages keep it busy for longer on a slow
disk, and what then fails is a message, or the whole run; here it is given the time that it takes.
Takes the arguments of flower-superlink.
"""

from __future__ import annotations

import ipaddress
import os
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.superlink.cli import flower_superlink

from fedex_lora.flower.refusals import Asgi, Scope, Send, known_keys, telling

PUBLIC = ("/v1/fleet/", "/health")  # what SuperNodes need
PATIENCE = ("busy_timeout", "300000")  # of SQLite, in milliseconds
CLIENTS = "FEDEX_LORA_CLIENTS"  # environment: the folder with the institutions' public keys


def guarded(app: Asgi) -> Asgi:
    """The same app, which refuses others than this machine all but `PUBLIC`."""

    async def guard(scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http" or _allowed(scope["path"], (scope.get("client") or [""])[0]):
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"only from the coordinator itself\n"})

    return guard


def _allowed(path: str, client: str) -> bool:
    """Whether `client` may use `path`.

    Example:
        >>> _allowed("/v1/control/start-run", "127.0.0.1"), _allowed("/v1/control/x", "10.0.0.7")
        (True, False)
        >>> _allowed("/v1/fleet/pull-messages", "10.0.0.7"), _allowed("/v1/fleet/../x", "10.0.0.7")
        (True, False)
    """
    if path.startswith(PUBLIC) and ".." not in path:
        return True
    try:
        return ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False


def main() -> None:
    """Starts the SuperLink behind the guard, with a patient database."""
    run, clients = uvicorn.run, os.environ.get(CLIENTS)
    keys = known_keys(Path(clients)) if clients else {}

    def run_guarded(app: Any, **options: Any) -> None:
        # forwarded headers would let anybody claim to be this machine
        told = telling(app, keys, partial(print, flush=True))
        run(guarded(told), proxy_headers=False, **options)

    uvicorn.run = run_guarded  # type: ignore[assignment]
    sql_mixin.SQLITE_PRAGMAS = (*SQLITE_PRAGMAS, PATIENCE)  # pyright: ignore[reportPrivateImportUsage]
    flower_superlink()


if __name__ == "__main__":
    main()
