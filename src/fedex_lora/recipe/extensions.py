"""Transports and train functions of other packages, by the names that recipes call them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from fedex_lora.aggregation.registry import Registry
from fedex_lora.errors import UserError

OURS = ("local", "flower", "flower-simulation")  # transports of this package

Row = Callable[..., Any]


def _checked(what: str, name: str, row: Row, *args: str, **kwargs: str) -> None:
    expected = ", ".join([*args, *(f"{key}=" for key in kwargs)])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{what} {name!r}: expected a name of letters, digits, '.', '_' and '-'")
    if not callable(row):
        raise UserError(f"{what} {name!r}: {row!r} is no function; expected one of ({expected})")
    try:
        inspect.signature(row).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{what} {name!r}: {error}; it is called with ({expected})") from None


def _transport(name: str, row: Row) -> None:
    if name in OURS:
        raise UserError(f"transport {name!r}: fedex-lora has one of that name; take another")
    _checked("transport", name, row, "recipe", "out", "clients", "watcher")


def _train_function(name: str, row: Row) -> None:
    _checked("train function", name, row, "module", "rows", round="", client="", rng="")


def _same(one: Row, other: Row) -> bool:
    """Whether they are one, defined again: in a notebook whose cell was run twice."""
    a, b = ((getattr(f, "__module__", 0), getattr(f, "__qualname__", f)) for f in (one, other))
    return a == b


TRANSPORTS: Registry[Row] = Registry("transport", "fedex_lora.transports", {}, _transport, _same)
"""What `engine.kind` may name beside this package's own."""

TRAIN_FUNCTIONS: Registry[Row] = Registry(
    "train function", "fedex_lora.train_functions", {}, _train_function, _same
)
"""What `engine.train` may name."""


def register_transport(name: str, assemble: Row) -> None:
    """Makes a way to carry messages known to recipes of this process.

    Args:
        name: What `engine.kind` calls it.
        assemble: Is called with (recipe, the run's directory, names of the clients of a run that is
            resumed or None, watcher); returns what is run (`engines.setup.Federation`) and who
            carries its messages (`engines.engine.Engine`).

    Raises:
        UserError: It takes other arguments, or there is one of that name.

    Example:
        >>> register_transport("local", print)
        Traceback (most recent call last):
        fedex_lora.errors.UserError: transport 'local': fedex-lora has one of that name; ...
    """
    TRANSPORTS.register(name, assemble, getattr(assemble, "__module__", "?"))


def register_train(name: str, train: Row) -> None:
    """Makes a training loop known to recipes of this process.

    Args:
        name: What `engine.train` calls it.
        train: As of `fedex_lora.Federation`: is called with (module, rows, round=, client=, rng=),
            trains the module in place, and returns a `Trained`.

    Raises:
        UserError: It takes other arguments, or there is one of that name.
    """
    TRAIN_FUNCTIONS.register(name, train, getattr(train, "__module__", "?"))
