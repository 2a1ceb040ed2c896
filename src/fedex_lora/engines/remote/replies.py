"""Replies that came over the wire, checked as far as they can be without their tensors.

Who sent a reply is known from the transport. What a reply says of itself is only compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedex_lora.engines.remote.wire import NOTHING, PROTOCOL, Identity
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import read_about
from fedex_lora.federation.header import Limit
from fedex_lora.recipe import CLIENT_NAME, CLIENT_NAME_RULE
from fedex_lora.tasks import Task
from fedex_lora.tasks.metrics import Metric

_MOST_SCORES = 50
_MOST_ROWS = 10**12
Said = TypeVar("Said", bound=BaseModel)


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)


class Hello(_Reply):
    """A client that found everything to agree.

    Attributes:
        rows: It trains on.
        validation: Rows of its own that it scores models on.
        held: The version it holds.
        time: Its clock. Like `versions`, of packages, it may be anything: it is only remarked on.
    """

    rows: int = Field(ge=1, le=_MOST_ROWS)
    validation: int = Field(ge=0, le=_MOST_ROWS)
    held: int = Field(ge=NOTHING, le=_MOST_ROWS)
    time: Any = None
    versions: Any = None


class Failure(_Reply):
    """A client that cannot do what it was asked to."""

    reason: str


class Lacking(_Reply):
    """A client that holds less than was believed."""

    version: int = Field(ge=NOTHING)


class Scored(_Reply):
    """A client's scores of the model that it was sent."""

    scores: dict[str, float]


def about_reply(
    reply: bytes, identity: Identity, sender: str | None, limit: Limit
) -> dict[str, Any]:
    """A reply's `about`, if it is one of this federation and names who sent it.

    Args:
        sender: Whose node it came from; None where the transport knows no names.

    Raises:
        UserError: It is none, or of another protocol, or calls itself somebody else; both names
            are in the text.
    """
    about = read_about(reply, limit)
    name = about.get("client")
    if about.get("protocol") != PROTOCOL:
        raise UserError(
            f"client {text(sender or name)} speaks protocol {text(about.get('protocol'))}, not "
            f"{PROTOCOL}; install the same version on both sides"
        )
    if about.get("federation") != identity.federation:
        raise UserError(f"a reply of {text(sender or name)} that belongs to another run")
    if not isinstance(name, str) or not CLIENT_NAME.fullmatch(name):
        raise UserError(f"a client calls itself {text(name)[:80]!r}; {CLIENT_NAME_RULE}")
    if sender is not None and name != sender:
        raise UserError(f"client {sender} calls itself {name}; whose message it is tells its node")
    return about


def said(kind: type[Said], about: Mapping[str, Any]) -> Said:
    """What a reply says, with the types that it must have.

    Raises:
        UserError: A field is missing or of another type, or out of its range.
    """
    try:
        return kind.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{text(where)[:80]}: {first['msg']}, got {text(first['input'])[:40]!r}"
        ) from None


def text(value: object) -> str:
    """Something that came over the wire, fit to be shown.

    Example:
        >>> text("a\\x1b[31mb")
        'a [31mb'
    """
    return "".join(c if c.isprintable() else " " for c in str(value)[:1000])


def check_scores(found: Mapping[str, float], task: Task) -> dict[str, float]:
    """Scores by name; empty if none were sent. NaN may be one: of too few rows, say.

    Args:
        task: Its primary metric must be among them.

    Raises:
        UserError: They are too many, lack the primary one, or one is out of its metric's range.
    """
    if len(found) > _MOST_SCORES:
        raise UserError(f"{len(found)} scores; at most {_MOST_SCORES} are expected")
    if found and task.primary not in found:
        raise UserError(f"its scores lack {task.primary}")
    for name, value in found.items():
        wanted = task.metrics.get(name, Metric()).expected(value)
        if wanted and not math.isnan(value):
            raise UserError(f"its score {text(name)[:60]} is {value:g}; expected {wanted}")
    return {text(name)[:60]: value for name, value in found.items()}
