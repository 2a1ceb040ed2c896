"""flower-superlink with the control paths closed to the network, and to this machine's other users.

Flower 1.41 serves clients, the program that runs apps, and the control of runs on one port, and
asks for no credentials for the last: whoever reaches the port could start a run, that is, programs
at the coordinator. Here only what clients need answers to others than this machine, and the control
paths ask for the deployment's secret besides, a file that its owner alone can read.

Who may be a client is decided in `refusals`, and how much one may send in `bounds`.

Flower gives up on its database after five seconds. Large messages keep it busy for longer on a slow
disk, and what then fails is a message, or the whole run; here it is given the time that it takes.
Takes the arguments of flower-superlink.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.superlink.cli import flower_superlink

from fedex_lora.flower.bounds import bounded, check_senders
from fedex_lora.flower.control import HEADER, read_secret, ready_file
from fedex_lora.flower.refusals import Asgi, Keys, Scope, Send, admitting

PUBLIC = ("/v1/fleet/", "/health")  # what SuperNodes need
LOCAL = ("/v1/runtime/",)  # what the SuperExec needs: Flower asks for its secret, and for tokens
_BOTH: dict[str, Any] = {"::": "", "::1": ["127.0.0.1", "::1"]}
PATIENCE = ("busy_timeout", "300000")  # of SQLite, in milliseconds
CLIENTS = "FEDEX_LORA_CLIENTS"  # environment: the folder with the institutions' public keys
_REFUSED = "only from the coordinator itself, by the account that has the deployment's secret\n"


def guarded(app: Asgi, secret: bytes, ready: Callable[[], bool]) -> Asgi:
    """The same app; clients reach `PUBLIC` of it, this machine `LOCAL`, and who has the secret all.

    Args:
        ready: Whether all institutions are registered; before, nodes are asked to come again.
    """

    async def guard(scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        path, local = scope["path"], _is_local((scope.get("client") or [""])[0])
        own = local and _has(scope, secret)
        if path.startswith("/v1/fleet/") and not ready():
            await _answer(send, 503, "not ready yet\n")
        elif own or (".." not in path and path.startswith(PUBLIC + (LOCAL if local else ()))):
            await app(scope, receive, send)
        else:
            await _answer(send, 403, _REFUSED)

    return guard


def _has(scope: Scope, secret: bytes) -> bool:
    given = [value for name, value in scope.get("headers", ()) if name == HEADER.encode()]
    return len(given) == 1 and hmac.compare_digest(given[0], secret)


def _is_local(client: str) -> bool:
    """Whether it is this machine.

    Example:
        >>> _is_local("127.0.0.1"), _is_local("::ffff:127.0.0.1"), _is_local("10.0.0.7")
        (True, True, False)
    """
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def main() -> None:
    """Starts the SuperLink behind the guard, with a patient database."""
    run, clients, secret = uvicorn.run, os.environ.get(CLIENTS), read_secret()
    keys = Keys(Path(clients) if clients else None)
    os.umask(0o077)  # the database holds the institutions' updates

    def run_guarded(app: Any, **options: Any) -> None:
        # asyncio would listen to IPv6 alone, and the coordinator itself uses IPv4
        options["host"] = _BOTH.get(options["host"], options["host"])
        told = admitting(bounded(app), keys, partial(print, flush=True))
        app = guarded(told, secret, ready_file().exists)
        # forwarded headers would let anybody claim to be this machine
        run(app, proxy_headers=False, **options)

    uvicorn.run = run_guarded  # type: ignore[assignment]
    sql_mixin.SQLITE_PRAGMAS = (*SQLITE_PRAGMAS, PATIENCE)  # pyright: ignore[reportPrivateImportUsage]
    check_senders()
    flower_superlink()


if __name__ == "__main__":
    main()
