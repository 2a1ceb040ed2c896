"""Which runs a client takes part in: as many as its operator said, whatever the server says.

The operator's word and what came of it lie in a file at the client. A run is known by its number,
which a resumed one keeps, so that one costs no further word. To greet a client costs nothing; its
first turn does. How many turns a run may take is limited too: a server that repeats rounds for ever
would otherwise have bought all rounds with one word.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedex_lora.disk import write_atomic
from fedex_lora.errors import UserError

FILE = "runs.json"
_RECENT = 60.0  # seconds; a coordinator that goes on waiting asks more often
_MOST = 50  # runs that were asked for in vain and are remembered


class Undecided(UserError):
    """The client's operator has not said whether it takes part in this run; that may still come.

    Attributes:
        first: Whether the run was asked for the first time.
    """

    def __init__(self, first: bool) -> None:
        super().__init__("its operator has not said yet whether it takes part in this run")
        self.first = first


@dataclass(frozen=True)
class Consent:
    """The client's word on runs.

    Attributes:
        path: Of the file.
        runs: In how many runs it takes part in all, besides those of `allow`.
        ask: Every run is asked about, and `runs` does not count.
    """

    path: Path
    runs: int = 1
    ask: bool = False

    def greeted(self, run: str) -> None:
        """Whether it would take part in a run.

        Raises:
            Undecided: It has not been told. The run stands among those to be asked about.
            UserError: Its operator has declined this run.
        """
        with self._changed() as state:
            self._check(state, run)

    def turn(self, run: str, most: int) -> None:
        """Takes down that it takes a turn in a run.

        Args:
            most: How many turns a run may take.

        Raises:
            Undecided, UserError: As `greeted`; or there were too many turns already.
        """
        with self._changed() as state:
            self._check(state, run)
            known = state["runs"].setdefault(run, _new())
            if known["turns"] >= most:
                raise UserError(
                    f"this run has had {known['turns']} turns of this client, which are all that "
                    f"its rounds and their repetitions may take"
                )
            known["turns"] += 1

    def joined(self) -> dict[str, str]:
        """When it began to take part, by run."""
        return {run: of["first"] for run, of in self._read()["runs"].items() if of["turns"]}

    def left(self) -> int:
        """In how many more runs it takes part without another word."""
        state = self._read()
        return max(0, self.runs + state["more"] - _joined(state))

    def waiting(self) -> str | None:
        """The run that was asked for last, in the last minute, and waits for a word."""
        now, runs = time.time(), self._read()["runs"]
        vain = {r: of["last"] for r, of in runs.items() if not of["turns"] and of["word"] is None}
        newest = max(vain, key=lambda run: vain[run], default=None)
        return newest if newest is not None and now - vain[newest] < _RECENT else None

    def answer(self, run: str, word: bool) -> None:
        """The operator's word on one run."""
        with self._changed() as state:
            state["runs"].setdefault(run, _new())["word"] = word

    def allow(self, more: int = 1) -> None:
        """The operator's word on so many more runs, whichever they are."""
        with self._changed() as state:
            state["more"] += more

    def _check(self, state: dict[str, Any], run: str) -> None:
        known = state["runs"].get(run)
        if known is not None and (known["word"] or (known["turns"] and known["word"] is None)):
            return
        if known is not None and known["word"] is False:
            raise UserError("its operator has declined this run")
        if not self.ask and _joined(state) < self.runs + state["more"]:
            return
        state["runs"][run] = {**(known or _new()), "last": time.time()}
        vain = [name for name, of in state["runs"].items() if not of["turns"] and not of["word"]]
        for name in vain[:-_MOST]:
            del state["runs"][name]
        raise Undecided(first=known is None)

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        """The state, to be changed by one process at a time; written whatever happens within."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            state = self._read()
            before = json.dumps(state)
            try:
                yield state
            finally:
                after = json.dumps(state)
                if after != before:
                    write_atomic(self.path, after.encode())
                    self.path.chmod(0o600)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"more": 0, "runs": {}}
        try:
            state = json.loads(self.path.read_text())
            if not _is_state(state):
                raise ValueError("of another form")
            return state
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}: damaged; it says in which runs this client took part. Look at it, "
                "and delete it to begin anew"
            ) from None


def _is_state(state: Any) -> bool:
    return type(state["more"]) is int and all(
        type(of["turns"]) is int
        and of["word"] in (None, True, False)
        and isinstance(of["first"], str)
        and isinstance(of["last"], float)
        for of in state["runs"].values()
    )


def _new() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"first": now, "last": time.time(), "turns": 0, "word": None}


def _joined(state: dict[str, Any]) -> int:
    return sum(1 for of in state["runs"].values() if of["turns"])
