"""What a coordinator's message says of itself, checked as far as that goes without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fedex_lora.engines.remote.wire import PROTOCOL, Identity
from fedex_lora.errors import UserError

Value = TypeVar("Value")


def run_of(about: Mapping[str, Any]) -> str:
    """The run that a message belongs to, by its number.

    Raises:
        UserError: It has none.
    """
    federation = field(about, "federation", str)
    if len(federation) != 32 or not set(federation) <= set("0123456789abcdef"):
        raise UserError("a message without a federation's number")
    return federation


def identity_of(about: Mapping[str, Any]) -> Identity:
    """Which federation a message belongs to, and which of its histories.

    Raises:
        UserError: It does not say so.
    """
    try:
        lineage = tuple((int(v), str(mark)[:64]) for v, mark in field(about, "lineage", list))
    except (ValueError, TypeError, OverflowError):
        raise UserError("a message whose lineage cannot be read") from None
    return Identity(run_of(about), lineage or ((0, ""),))


def field(about: Mapping[str, Any], name: str, kind: type[Value]) -> Value:
    """What a message says under a name, of that type.

    Raises:
        UserError: Nothing, or something else.
    """
    value = about.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"a message without its {name}; install the same version on both sides")
    return value


def addressed(about: Mapping[str, Any], name: str, rounds: int) -> Identity:
    """Which federation a message for this client belongs to.

    Args:
        rounds: Of this client's own recipe: no others are taken part in.

    Raises:
        UserError: It is for another client, or for another round.
    """
    identity = identity_of(about)
    if about.get("client") != name:
        raise UserError(f"a message for {str(about.get('client'))[:80]!r}, not for this client")
    version = field(about, "version", int)
    if version > rounds - (about.get("kind") in ("round", "secure")):
        raise UserError(
            f"asked for round {version + 1}; this client's recipe has {rounds} rounds "
            "(federation.rounds), which is what it agreed to"
        )
    return identity


def common(about: Mapping[str, Any], client: str) -> dict[str, Any]:
    """What every reply begins with; whose it is tells the node, and is compared with this name."""
    return {"protocol": PROTOCOL, "federation": about.get("federation"), "client": client}
