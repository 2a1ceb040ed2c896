"""Replies that came over the wire, checked as far as they can be without their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedex_lora.engines.wire import PROTOCOL, Identity
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import read_about
from fedex_lora.recipe import CLIENT_NAME, CLIENT_NAME_RULE

_MOST_SCORES = 50


def about_reply(reply: bytes, identity: Identity) -> dict[str, Any]:
    """A reply's `about`, if it is one of this federation.

    Raises:
        UserError: It is none, or of another protocol, or its client has no proper name.
    """
    about = read_about(reply)
    name = about.get("client")
    if about.get("protocol") != PROTOCOL:
        raise UserError(
            f"client {text(name)} speaks protocol {text(about.get('protocol'))}, not {PROTOCOL}; "
            "install the same version on both sides"
        )
    if about.get("federation") != identity.federation:
        raise UserError("a reply that belongs to another run")
    if name is not None and (not isinstance(name, str) or not CLIENT_NAME.fullmatch(name)):
        raise UserError(f"a client calls itself {text(name)!r}; {CLIENT_NAME_RULE}")
    return about


def text(value: object) -> str:
    """Something that came over the wire, fit to be shown.

    Example:
        >>> text("a\\x1b[31mb")
        'a [31mb'
    """
    return "".join(c if c.isprintable() else " " for c in str(value))[:1000]


def count(value: object) -> int:
    """A number of rows or a version.

    Raises:
        UserError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"expected a count, got {text(value)}")
    return value


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    """Scores by name.

    Raises:
        UserError: They are too many.
    """
    if len(found) > _MOST_SCORES:
        raise UserError(f"{len(found)} scores; at most {_MOST_SCORES} are expected")
    return {text(name)[:60]: float(value) for name, value in found.items()}
