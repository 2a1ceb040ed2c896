"""What crossed the line: one JSON object a message, at each client and at the coordinator.

`time` (UTC), `run`, `round`, `kind`, `direction` (in, out), `peer`, `bytes`, `digest` (SHA-256 of
the message) and `outcome`. Lines are only ever appended; a file that has grown is set aside under
the time of that. Nothing of a message's content is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedex_lora.disk import append_private, reason
from fedex_lora.errors import UserError

FILE = "audit.jsonl"
_LARGE = 10_000_000  # bytes
_LONG = 200  # characters of an outcome


@dataclass(frozen=True)
class Audit:
    """The log in a file; none without one.

    Attributes:
        path: Of the file that is written to.
    """

    path: Path | None = None

    def write(
        self,
        direction: str,
        kind: object,
        run: object,
        round: object,
        message: bytes,
        outcome: str,
        peer: str | None = None,
    ) -> None:
        """Appends one line. What is no plain value, because it came over the wire, is null.

        Args:
            direction: "in" or "out".
            outcome: What became of the message; text that may leave this machine.
            peer: Whom it went to or came from.

        Raises:
            UserError: It cannot be written: nothing goes on without it.
        """
        if self.path is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": _plain(run),
            "round": round if type(round) is int and abs(round) < 10**9 else None,
            "kind": _plain(kind),
            "direction": direction,
            "peer": peer,
            "bytes": len(message),
            "digest": hashlib.sha256(message).hexdigest(),
            "outcome": outcome[:_LONG],
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rotate(self.path)
            append_private(self.path, json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: the audit log cannot be written: {reason(error)}; make room there"
            ) from None

    def _rotate(self, path: Path) -> None:
        if path.exists() and path.stat().st_size > _LARGE:
            then = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            aside = path.with_name(f"{path.stem}-{then}{path.suffix}")
            if not aside.exists():  # twice in a second: the file grows a little longer
                path.rename(aside)


def appended(path: Path) -> Iterator[list[dict[str, Any]]]:
    """At every `next` the lines that were written since the last one, or since the call."""
    lines = _appended(path)
    next(lines)
    return lines


def _appended(path: Path) -> Iterator[list[dict[str, Any]]]:
    file = path.open("rb") if path.exists() else None
    if file is not None:
        file.seek(0, os.SEEK_END)
    rest = b""
    yield []
    while True:
        moved = path.exists() and (
            file is None or not os.path.samestat(os.fstat(file.fileno()), path.stat())
        )
        found = rest if file is None else rest + file.read()
        if moved:  # set aside; what was read is its end
            if file is not None:
                file.close()
            file = path.open("rb")
            found += file.read()
        *lines, rest = found.split(b"\n")
        yield [json.loads(line) for line in lines]


def _plain(value: object) -> str | None:
    """A name that came over the wire, if it may be one."""
    return value if isinstance(value, str) and len(value) <= 64 and value.isprintable() else None
