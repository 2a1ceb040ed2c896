"""The operator of a client, and runs: what was said so far, and `--ask` at the terminal."""

from __future__ import annotations

import select
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from fedex_lora.engines.remote.consent import Consent

_YES, _NO = ("y", "yes"), ("n", "no")


def said_so_far(consent: Consent, folder: Path) -> str:
    """In which runs this client will take part, in one line."""
    joined, left = len(consent.joined()), consent.left()
    before = f"it took part in {joined} before; " if joined else ""
    if consent.ask:
        return f"every run is asked about here ({before}one that is resumed is not)"
    if left:
        return f"takes part in {left} run{'s' if left > 1 else ''} ({before}--runs)"
    return (
        f"takes part in no new run ({before}--runs); to take part in one more: "
        f"fedex-lora deploy allow {shlex.quote(str(folder))}"
    )


class Asking:
    """Asks at the terminal about runs that wait for a word, without waiting for the answer.

    Args:
        consent: The client's.
        say: Shows a line.
    """

    def __init__(self, consent: Consent, say: Callable[[str], object]) -> None:
        self.consent, self.say = consent, say
        self.asked: str | None = None

    def look(self) -> None:
        """Asks if there is something to ask, and takes an answer if there is one."""
        if not self.consent.ask:
            return
        waiting = self.consent.waiting()
        if self.asked != waiting:
            self.asked = waiting
            if waiting is not None:
                self.say(f"The coordinator begins run {waiting[:8]}. Take part? [y/n]")
        if self.asked is not None and select.select([sys.stdin], [], [], 0)[0]:
            word = sys.stdin.readline().strip().lower()
            if word in (*_YES, *_NO):
                self.consent.answer(self.asked, word in _YES)
                self.say(f"run {self.asked[:8]}: {'takes part' if word in _YES else 'declined'}")
                self.asked = None
            else:
                self.say(f"Expected y or n. Take part in run {self.asked[:8]}? [y/n]")
