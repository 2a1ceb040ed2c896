"""Aggregation against the number of clients: seconds, and memory above the process's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter, sleep

import psutil

from benchmarks.results import Figure, Row
from benchmarks.shapes import ROBERTA_LARGE, ROBERTA_LARGE_LAYERS, end, layers, start
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.methods import METHODS

RANK = 8
COUNTS = (2, 10, 100, 200, 1000)


@dataclass(frozen=True)
class Scale:
    clients: int
    seconds: float  # in `add` and `finish`, without making the clients' factors
    memory: int  # bytes at the peak above what the process held before


def row(counts: tuple[int, ...] = COUNTS) -> Row:
    """Time and memory for 2 to 1,000 clients; the goals compare counts after the change-over.

    The dense sums take over where the factors would be larger, at (k−1)·8·2048 ≥ 1024², k = 65.
    """
    aggregate(2)
    found = [aggregate(k) for k in counts]
    last, dense = found[-1], next(s for s in found if s.clients >= 100)
    growth = (last.seconds / dense.seconds) / (last.clients / dense.clients)
    figures = [
        Figure(
            f"time a client, {last.clients:,} over {dense.clients} clients",
            growth,
            "×",
            None,
            None,
            1.2,
        ),
        Figure(
            f"memory, {last.clients:,} over {dense.clients} clients",
            last.memory / dense.memory,
            "×",
            at_most=1.2,
        ),
    ]
    for one in found:
        figures.append(Figure(f"{one.clients:,} clients", one.seconds, "s"))
        figures.append(Figure(f"{one.clients:,} clients, memory", one.memory, "B"))
    return Row(
        "Aggregation by the number of clients: RoBERTa-large, query and value, rank 8",
        figures,
        [
            "Adding and finishing with the deviations, each number of clients once; the memory "
            "that the process holds at most above what it held before."
        ],
    )


def aggregate(clients: int) -> Scale:
    """RoBERTa-large's query and value at rank 8, `clients` clients, one after the other."""
    shapes = layers(ROBERTA_LARGE, ROBERTA_LARGE_LAYERS, RANK)
    begin = start(shapes)
    few = [end(begin, i) for i in range(min(clients, 8))]
    seconds = 0.0
    with Peak() as peak:
        aggregator = Aggregator(METHODS["fedex"], shapes, frozenset("AB"), clients=clients)
        for one in _ends(few, clients):
            began = perf_counter()
            aggregator.add(1.0, begin, one)
            seconds += perf_counter() - began
        began = perf_counter()
        result = aggregator.finish()
        seconds += perf_counter() - began
        assert result.increment
    return Scale(clients, seconds, peak.bytes)


def _ends(few: list[AdapterState], clients: int) -> Iterator[AdapterState]:
    """Eight different clients in turn; drawing a thousand would take longer than adding them."""
    return (few[i % len(few)] for i in range(clients))


class Peak:
    """The largest resident size while the block runs, above that before it."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.bytes, self._done = 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done:
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()
