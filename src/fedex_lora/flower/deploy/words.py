"""What of Flower's output is shown to people, and in which words; all of it goes to a file."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

from fedex_lora.disk import append_private

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) ?:\s*(.*)|\d{4}-\S+ (INFO) (.*)")
_CONNECTION = re.compile(r"Connection (attempt failed|successful)")
_AGAIN = 600.0  # seconds until a line that says what the last one said is shown again
_LARGE = 20_000_000  # bytes of a log, above which a new one is begun

CONNECTED = "connected to the server; waiting for the coordinator"
ANSWERS, SILENT = "the server answers", "the server does not answer; trying again"
REFUSES = "the server refuses this client: "

# (what Flower says, what is shown; None for nothing). The first that fits counts.
_WORDS: list[tuple[re.Pattern[str], str | None]] = [
    (re.compile(pattern), words)
    for pattern, words in [
        (r"SuperNode ID: \d+", CONNECTED),
        (r"Sent successfully", "sent; waiting for the coordinator"),
        (r"Connection attempt failed, retrying", SILENT),
        (r"Connection successful after", ANSWERS),
        (r"Run ID \d+ is not in `RUNNING` status", "the coordinator has ended that run"),
        (r"Giving up reconnection|EXPERIMENTAL|DEBUG logs enabled", None),
        (r"Exit Code: 305", None),  # a line after it says why
        (r"Invalid SuperNode authentication|\[/v1/fleet/", None),  # said by the guard
    ]
]
# lines without a level: parts of a longer message
_PARTS: list[tuple[re.Pattern[str], str | None]] = [
    (re.compile(pattern), words)
    for pattern, words in [
        (r"^refused: (.*)", rf"{REFUSES}\1"),
        (r"\[code: \d+\] |Failed to initialize the connection|The SuperNode could not est", None),
        (r"For more information, visit: <https://flower|^\s*$", None),
        (r"ClientApp raised an exception|Successfully installed ", None),
    ]
]


def shown(line: str, who: str = "SuperNode") -> tuple[str | None, bool]:
    """A line of Flower's processes in our words, None if it says nothing to people; and whether it
    is trouble, which is told once though it happens again and again.

    Args:
        who: The process; only a SuperNode's connection is that to the server.

    Example:
        >>> shown("\\x1b[92mINFO \\x1b[0m:      SuperNode ID: 12")
        ('connected to the server; waiting for the coordinator', False)
        >>> shown("INFO:     Started server process [7]"), shown("round 1: loss 0.5")
        ((None, False), ('round 1: loss 0.5', False))
        >>> shown("refused: its key was revoked")
        ('the server refuses this client: its key was revoked', True)
    """
    plain = _COLOURS.sub("", line).rstrip()
    found = _LEVEL.match(plain)
    if found is None:
        for pattern, words in _PARTS:
            if part := pattern.search(plain):
                return None if words is None else part.expand(words), True
        return plain, False
    level, text = found[1] or found[3], found[2] or found[4] or ""
    grave = level in ("WARNING", "ERROR", "CRITICAL")
    if who != "SuperNode" and _CONNECTION.search(text):
        return None, grave
    for pattern, words in _WORDS:
        if pattern.search(text):
            return words, grave
    return text if grave else None, grave


class Log:
    """Shows lines, and keeps all of Flower's in a file.

    Args:
        show: Is given what people should see, and whether it is trouble: nothing twice in a row,
            and trouble that comes again when something else was told meanwhile, or after ten
            minutes.
        file: Of all that Flower's processes print, for this account alone.
    """

    def __init__(self, show: Callable[[str, bool], object], file: Path) -> None:
        self.show, self.file = show, file
        self.last = "Flower's log says why: " + str(file)  # of its troubles
        self._troubles: dict[str, float] = {}
        self._shown, self._when = "", 0.0
        if file.exists() and file.stat().st_size > _LARGE:
            file.replace(file.with_name(f"{file.name}.old"))

    def say(self, text: str, trouble: bool = False) -> None:
        """A line of ours."""
        now = time.monotonic()
        if text == self._shown and now - self._when < _AGAIN:
            return
        if not trouble:
            self._troubles.clear()
        elif now - self._troubles.get(text, -_AGAIN) < _AGAIN:
            return
        else:
            self._troubles[text] = now
        self._shown, self._when = text, now
        self.show(text, trouble)

    def take(self, line: str, who: str) -> None:
        """A line of one of Flower's processes."""
        with contextlib.suppress(OSError):  # a full disk: people are told all the same
            append_private(self.file, _COLOURS.sub("", line).rstrip() + "\n")
        text, trouble = shown(line, who)
        if text:
            self.last = text if trouble else self.last
            self.say(text, trouble)
