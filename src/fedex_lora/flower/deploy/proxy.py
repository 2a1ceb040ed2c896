"""Behind a proxy, and with certificates of an authority of one's own."""

from __future__ import annotations

import os
import socket
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from cryptography.hazmat.primitives.serialization import Encoding

from fedex_lora.disk import reason, write_atomic
from fedex_lora.errors import DeploymentError, RecipeError
from fedex_lora.flower.deploy.keys import read_certificates

_HERE = ("127.0.0.1", "localhost", "::1")
AUTHORITY = "authority.crt"  # in an institution's folder


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that tunnels to the server by CONNECT.

    Attributes:
        address: `http://[USER:PASSWORD@]HOST:PORT`.
    """

    address: str

    @property
    def host(self) -> str:
        return urlsplit(self.address).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 80

    def __str__(self) -> str:
        """Without user and password."""
        return f"{self.host}:{self.port}"

    def headers(self) -> dict[str, str]:
        """What it is told of who asks."""
        parts = urlsplit(self.address)
        if parts.username is None:
            return {}
        word = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return {"Proxy-Authorization": f"Basic {b64encode(word.encode()).decode()}"}

    def check(self) -> None:
        """Raises a `UserError` if nobody answers there."""
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError as error:
            raise DeploymentError(
                f"the proxy {self} does not answer: {reason(error)}; name another with `proxy`, or "
                "the server in NO_PROXY, if it is reached without one"
            ) from None


def proxy_for(host: str, named: str | None = None) -> Proxy | None:
    """The proxy by which a server is reached; None for none.

    Args:
        named: Its address; by default what HTTPS_PROXY (or ALL_PROXY) and NO_PROXY say.

    Raises:
        UserError: It is no HTTP proxy's address.
    """
    found = getproxies()
    address = named or found.get("https") or found.get("all")
    if not address or host in _HERE or (named is None and proxy_bypass(host)):
        return None
    whole = address if "://" in address else f"http://{address}"
    try:
        usable = urlsplit(whole).scheme == "http" and Proxy(whole).host and Proxy(whole).port
    except ValueError:
        usable = False
    if not usable:
        source = "`proxy`" if named else "HTTPS_PROXY"
        raise RecipeError(f"{source}: expected http://HOST:PORT of an HTTP proxy")
    return Proxy(whole)


def past_proxies() -> dict[str, str]:
    """Environment by which this machine's own processes reach one another without a proxy."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    told = ",".join(dict.fromkeys([*filter(None, known.split(",")), *_HERE]))
    return {"NO_PROXY": told, "no_proxy": told}


def through(proxy: Proxy | None, host: str) -> dict[str, str]:
    """Environment by which a server is reached through a proxy, or surely without one."""
    told = ",".join(_HERE if proxy else (*_HERE, host))
    named = {} if proxy is None else dict.fromkeys(("HTTPS_PROXY", "https_proxy"), proxy.address)
    return {"NO_PROXY": told, "no_proxy": told, **named}


def trusted(own: Path, authority: Path | None) -> Path:
    """The certificates that a client trusts: the folder's ca.crt, or those of an authority of its
    own, which are written beside it without the remarks that such files have.

    Raises:
        UserError: There are none in the file.
    """
    if authority is None:
        return own / "ca.crt"
    found = read_certificates(authority, "certificates of an authority")
    text = b"".join(one.public_bytes(Encoding.PEM) for one in found)
    write_atomic(own / AUTHORITY, text)
    return own / AUTHORITY
