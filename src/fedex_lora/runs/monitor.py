"""What a run tells monitoring: figures for Prometheus, and whether it goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from fedex_lora.disk import reason
from fedex_lora.errors import DeploymentError, RecipeError
from fedex_lora.federation.record import Record
from fedex_lora.runs.watch import Start, Watcher


class Monitor:
    """A watcher that passes everything on, and keeps figures of it.

    Attributes:
        registry: The figures, all of them called `fedex_lora_...`.
    """

    def __init__(self, inner: Watcher) -> None:
        self.inner, self.registry = inner, CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedex_lora_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fedex_lora_{name}", text, labels, registry=self.registry)

        self._round = gauge("round", "Rounds that are done.")
        self._rounds = gauge("rounds", "Rounds that there are to be.")
        self._clients = gauge("clients", "Of the last round, by what became of them", "state")
        self._score = gauge("score", "The score of the last round that was scored.")
        self._refusals = counter("refusals", "Updates that were refused or did not come.", "client")
        self._bytes = counter("bytes", "Bytes of all messages.", "direction")
        self._seconds = counter("seconds", "Seconds that rounds took.", "part")
        self._about: dict[str, Any] = {"status": "starting"}
        self._heard = time.monotonic()

    def health(self) -> dict[str, Any]:
        """Which run, at which round, and for how many seconds nothing was heard of it."""
        return {**self._about, "silent_seconds": round(time.monotonic() - self._heard, 1)}

    def started(self, start: Start) -> None:
        self._rounds.set(start.rounds)
        self._tell(status="training", run=start.out, rounds=start.rounds, round=0)
        self.inner.started(start)

    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None:
        self._tell(training=client, step=done, steps=total)
        self.inner.turn(round, client, done, total, loss)

    def round_done(self, record: Record) -> None:
        self._round.set(record["round"])
        for state, names in (
            ("taken", record["clients"]),
            ("refused", record["refused"]),
            ("lost", record["lost"]),
        ):
            self._clients.labels(state).set(len(names))
        for client in (*record["refused"], *record["lost"]):
            self._refusals.labels(client).inc()
        for direction in ("up", "down"):
            self._bytes.labels(direction).inc(sum(record[f"bytes_{direction}"].values()))
        for part, seconds in record["seconds"].items():
            self._seconds.labels(part).inc(seconds)
        self._scored(record)
        self._tell(round=record["round"])
        self.inner.round_done(record)

    def scored(self, record: Record) -> None:
        self._scored(record)
        self.inner.scored(record)

    def note(self, text: str) -> None:
        self._tell()
        self.inner.note(text)

    def _scored(self, record: Record) -> None:
        if record.get("score") is not None:
            self._score.set(record["score"])

    def _tell(self, **about: object) -> None:
        self._heard = time.monotonic()
        self._about = {**self._about, **about}


@contextmanager
def monitored(inner: Watcher, address: str) -> Iterator[Monitor]:
    """A watcher whose figures are at `/metrics` and `/health` of an address while the block runs.

    Args, raises: As `answering`.
    """
    monitor = Monitor(inner)
    with answering(monitor, address, inner.note):
        yield monitor


class Monitored(Protocol):
    """What has figures, and knows how it is."""

    registry: CollectorRegistry

    def health(self) -> dict[str, Any]: ...


@contextmanager
def answering(monitored: Monitored, address: str, say: Callable[[str], object]) -> Iterator[None]:
    """Answers at `/metrics` and `/health` of an address while the block runs.

    Args:
        address: PORT, of this machine alone, or HOST:PORT; port 0 takes a free one.
        say: Is told where.

    Raises:
        UserError: It is no address, or in use.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise RecipeError(f"`monitor`: {address!r}: expected PORT or HOST:PORT")
    host = host or "127.0.0.1"
    try:
        server = ThreadingHTTPServer((host, int(port)), _handler(monitored))
    except OSError as error:
        raise DeploymentError(f"`monitor`: {address}: {reason(error)}; name another port") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f"figures: http://{host}:{server.server_port}/metrics and /health")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _handler(monitored: Monitored) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", generate_latest(monitored.registry))
            elif self.path == "/health":
                self._answer(200, "application/json", json.dumps(monitored.health()).encode())
            else:
                self._answer(404, "text/plain", b"there are /metrics and /health\n")

        def _answer(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Who asks is nobody's business here."""

    return Handler
