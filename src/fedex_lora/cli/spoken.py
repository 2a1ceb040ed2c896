"""The app, and how the library's texts are said on the command line: with options."""

from __future__ import annotations

import logging
import re
from functools import cache

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_ARGUMENT = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def spoken(text: str) -> str:
    """A text of the library as the command line says it: arguments are options.

    Example:
        >>> spoken("`rank`: 0; `tight=True`, `rank=4` and `strict=False` are known, `lora` is none")
        '--rank: 0; --tight, --rank 4 and --no-strict are known, `lora` is none'
    """
    return _ARGUMENT.sub(_option, text)


def _option(argument: re.Match[str]) -> str:
    name, value = argument[1].replace("_", "-"), argument[2]
    if value == "False" and f"--no-{name}" in _options():
        return f"--no-{name}"
    if f"--{name}" not in _options():
        return argument[0]
    return f"--{name}" if value in (None, "True") else f"--{name} {value}"


@cache
def _options() -> frozenset[str]:
    """All options of all commands."""
    found, commands = set(), [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {text for one in command.params for text in (*one.opts, *one.secondary_opts)}
    return frozenset(found)


class Spoken(logging.Formatter):
    """Log lines as the command line says them."""

    def format(self, record: logging.LogRecord) -> str:
        return spoken(super().format(record))
