"""What a client tells monitoring: read from its audit log, and from what its SuperNode says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge

from fedex_lora.flower.deploy.words import ANSWERS, CONNECTED, REFUSES, SILENT

STATES = (
    "connecting", "unreachable", "waiting", "training", "scoring", "undecided", "refused",
)  # fmt: skip
_AT_WORK = {
    "round": "training", "secure": "training", "evaluate": "scoring", "final": "scoring",
    "refused": "refused",
}  # fmt: skip
_REFUSALS = ("refused", "unfit", "failed")


class Figures:
    """Figures of one client since its `deploy client` began.

    Args:
        client: Its name.
        rounds: Of its recipe.
    """

    def __init__(self, client: str, rounds: int) -> None:
        self.registry = CollectorRegistry()
        names, registry = ("client",), self.registry
        self._client, self._rounds = client, rounds
        self._round = Gauge(
            "fedex_lora_client_round", "Its last round.", names, registry=registry
        ).labels(client)
        Gauge("fedex_lora_client_rounds", "Rounds of its recipe.", names, registry=registry).labels(
            client
        ).set(rounds)
        self._state = Enum(
            "fedex_lora_client_state", "What it is at.", names, registry=registry, states=STATES
        ).labels(client)
        self._bytes = Counter(
            "fedex_lora_client_bytes", "Bytes of all messages.", (*names, "direction"),
            registry=registry,
        )  # fmt: skip
        self._seconds = Counter(
            "fedex_lora_client_seconds", "Seconds from a message to its reply.", (*names, "kind"),
            registry=registry,
        )  # fmt: skip
        self._refusals = Counter(
            "fedex_lora_client_refusals", "What it refused, failed at, or was refused for.",
            (*names, "kind"), registry=registry,
        )  # fmt: skip
        self._run: str | None = None
        self._asked: tuple[str, datetime] | None = None  # what is being answered, and since when
        self._last, self._heard, self._is = 0, time.monotonic(), "connecting"

    def health(self) -> dict[str, Any]:
        """What it is at, in which run and round, and for how many seconds nothing was heard."""
        about = {"status": self._is, "client": self._client, "run": self._run}
        silent = round(time.monotonic() - self._heard, 1)
        return {**about, "round": self._last, "rounds": self._rounds, "silent_seconds": silent}

    def message(self, line: Mapping[str, Any]) -> None:
        """A line of the audit log."""
        kind, when = str(line["kind"]), datetime.fromisoformat(line["time"])
        self._run = line["run"] or self._run
        if line["direction"] == "in":
            self._bytes.labels(self._client, "down").inc(line["bytes"])
            self._asked = kind, when
            self._become(_AT_WORK.get(kind, "waiting"))
        else:
            self._bytes.labels(self._client, "up").inc(line["bytes"])
            if self._asked is not None:
                asked, since = self._asked
                spent = max(0.0, (when - since).total_seconds())
                self._seconds.labels(self._client, asked).inc(spent)
                kind = "refused" if asked == "refused" else kind
                self._asked = None
            if kind in ("update", "secure"):
                self._last = line["round"] or self._last
                self._round.set(self._last)
            if kind in _REFUSALS:
                self._refusals.labels(self._client, kind).inc()
            self._become(kind if kind in ("undecided", "refused") else "waiting")

    def heard(self, text: str) -> None:
        """A line that people are shown."""
        if text == SILENT:
            self._become("unreachable")
        elif text in (ANSWERS, CONNECTED) and self._is in ("connecting", "unreachable", "refused"):
            self._become("waiting")
        elif text.startswith(REFUSES):
            self._become("refused")
            self._refusals.labels(self._client, "refused").inc()

    def _become(self, state: str) -> None:
        self._heard, self._is = time.monotonic(), state
        self._state.state(state)
