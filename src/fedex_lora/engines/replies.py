"""Replies that came over the wire, checked as far as they can be without their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedex_lora.engines.wire import PROTOCOL, Identity
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import read_about
from fedex_lora.recipe import CLIENT_NAME, CLIENT_NAME_RULE

_MOST_SCORES = 50
_MOST_ROWS = 10**12
_METRICS = frozenset({"loss", "steps", "seconds"})  # of `client.train`


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
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_ROWS:
        raise UserError(f"expected a count, got {text(value)[:40]}")
    return value


def check_metrics(found: Mapping[str, float]) -> None:
    """Raises a `UserError` if they are not those of a training."""
    if found.keys() != _METRICS:
        got, wanted = (", ".join(sorted(names)) for names in (found, _METRICS))
        raise UserError(f"metrics {got}; expected {wanted}")


def scores(found: object, primary: str) -> dict[str, float]:
    """Scores by name; empty if none were sent. NaN may be one: of too few rows, say.

    Args:
        primary: The one that must be among them.

    Raises:
        UserError: They are too many, lack the primary one, or are no scores.
    """
    if not isinstance(found, Mapping) or len(found) > _MOST_SCORES:
        raise UserError(f"expected at most {_MOST_SCORES} scores by name, got {text(found)[:80]}")
    values = {text(name)[:60]: float(value) for name, value in found.items()}
    if values and primary not in values:
        raise UserError(f"its scores lack {primary}")
    if infinite := [name for name, value in values.items() if math.isinf(value)]:
        raise UserError(f"its score {infinite[0]} is infinite")
    return values
