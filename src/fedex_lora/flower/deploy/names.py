"""Names of a deployment's server and of its institutions, before they go into certificates and
folders."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from fedex_lora.errors import RecipeError
from fedex_lora.recipe import CLIENT_NAME, CLIENT_NAME_RULE

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # of Windows


def host_name(text: str) -> str:
    """A name or an address under which clients reach the server, as certificates have it.

    Names in other scripts become ASCII (IDNA 2008), capitals become small letters.

    Raises:
        UserError: A port, a scheme, a path, brackets, a list, or whatever else is no name.

    Example:
        >>> host_name("Fed.Example.org"), host_name("zürich.example"), host_name("::1")
        ('fed.example.org', 'xn--zrich-kva.example', '::1')
    """
    bare = text.strip()
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return _domain(bare, text)
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise RecipeError(f"`host`: {text!r}: nobody can reach that address; name the server's own")
    return str(address)


def _domain(bare: str, text: str) -> str:
    for sign, why in (
        ("://", "without a scheme (and a path)"),
        ("/", "without a path"),
        ("[", "without brackets; the port is `port`"),
        ("]", "without brackets; the port is `port`"),
        (",", "one at a time: repeat `host` for each"),
        (";", "one at a time: repeat `host` for each"),
        (":", "without a port, which is `port`"),
        ("*", "no pattern: repeat `host` for each name"),
        ("@", "without an account"),
    ):
        if sign in bare:
            raise RecipeError(f"`host`: {text!r}: expected a name or an address alone, {why}")
    if len(bare.split()) > 1:
        raise RecipeError(f"`host`: {text!r}: has blanks; repeat `host` for each name")
    name = _ascii(bare.removesuffix("."), text)
    labels = name.split(".")
    if not name or len(name) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise RecipeError(
            f"`host`: {text!r}: no name of a server; expected letters, digits, '-', '.', such as "
            "fed.example.org, or an address"
        )
    if labels[-1].isdigit():
        raise RecipeError(f"`host`: {text!r}: no address; expected one such as 10.0.0.5 or ::1")
    return name


def _ascii(name: str, text: str) -> str:
    if name.isascii():
        return name.lower()
    import idna  # noqa: PLC0415 (comes with Flower)

    try:
        return idna.encode(name, uts46=True).decode()
    except idna.IDNAError as error:
        raise RecipeError(f"`host`: {text!r}: no name of a server: {error}") from None


def host_names(texts: Sequence[str]) -> list[str]:
    """All of them, each once, in the order given.

    Raises:
        UserError: As `host_name`; or there is none.
    """
    found = list(dict.fromkeys(map(host_name, texts)))
    if not found:
        raise RecipeError(
            "`host`: expected a name or an address under which clients reach the server"
        )
    return found


def check_client_names(names: Sequence[str], known: Iterable[str] = ()) -> None:
    """That the names can be folders on every file system, all at once.

    Args:
        known: Those that there are already.

    Raises:
        UserError: One is no name, or two would be one folder where case makes no difference.
    """
    if not names:
        raise RecipeError("`clients`: expected one or more names")
    seen = {name.lower(): name for name in known}
    for name in names:
        if not CLIENT_NAME.fullmatch(name):
            raise RecipeError(f"`clients`: {name!r}: {CLIENT_NAME_RULE}")
        if name.endswith(".") or _DEVICES.fullmatch(name):
            raise RecipeError(
                f"`clients`: {name!r}: cannot be a folder on Windows; choose another name"
            )
        other = seen.get(name.lower())
        if other == name:
            raise RecipeError(f"`clients`: {name!r} is there twice; names have to differ")
        if other is not None:
            raise RecipeError(
                f"`clients`: {other!r} and {name!r} are one folder where case makes no difference "
                "(macOS, Windows); choose another name"
            )
        seen[name.lower()] = name
