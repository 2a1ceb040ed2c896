"""What errors about rows show of them: the place, and forty characters, unless more is asked for.

Messages about rows end in logs, in tickets and with colleagues who may not see the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fedex_lora.errors import SHOWN, UserError, foreign, shows_rows

_MOST = 1000  # characters of a message
_SHORT = re.compile(r"\.\.\. \(\d+ characters\)")  # of a value that `errors.shown` has cut
_QUOTED = re.compile(r"""(?<!\w)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""", re.DOTALL)


@contextmanager
def about_rows() -> Iterator[None]:
    """Shortens what the errors that are raised within quote: values, and other programs' words."""
    try:
        yield
    except UserError as error:
        if shows_rows():
            raise
        short = shortened(str(error), [str(one) for one in foreign(error)])
        if short == str(error) and not _SHORT.search(short):
            raise
        raise type(error)(short + " (`show_rows=True` shows all of it)") from error


def shortened(text: str, words: list[str]) -> str:
    """A message with at most `SHOWN` characters of every quoted value.

    Args:
        words: What other programs said, of which there may be a part in the message.

    Example:
        >>> shortened(f"line 3: label is {'x' * 60!r}; expected 'a' or 'b'", [])
        "line 3: label is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'; expected 'a' or 'b'"
        >>> shortened("a.json: cannot be read: " + "y" * 60, ["y" * 60])
        'a.json: cannot be read: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy...'
    """
    for said in words:
        for line in said.splitlines():
            if len(line) > SHOWN:
                text = text.replace(line, line[:SHOWN] + "...")
    text = _QUOTED.sub(_cut, text)
    return text if len(text) <= _MOST else text[:_MOST] + "..."


def _cut(found: re.Match[str]) -> str:
    whole = found[0]
    inner = whole[1:-1]
    return whole if len(inner) <= SHOWN else f"{whole[0]}{inner[:SHOWN]}...{whole[0]}"
