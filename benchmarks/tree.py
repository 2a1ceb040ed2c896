"""10,000 clients through two levels of regional servers: seconds, memory and error."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from benchmarks.results import Figure, Row
from benchmarks.scaling import Peak
from benchmarks.shapes import ROBERTA_LARGE, end, layers, start
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.aggregator import Aggregate, Aggregator
from fedex_lora.aggregation.methods import METHODS

RANK = 8
LAYERS = 2  # of each shape; more take as many times the time and the memory
LEVELS = (10, 10, 100)  # regions, districts of a region, clients of a district
SPREAD = 1e-2


def row(levels: tuple[int, ...] = LEVELS) -> Row:
    """The tree against one server for all; both hold a dense sum for each open level."""
    shapes = layers(ROBERTA_LARGE, LAYERS, RANK)
    begin = start(shapes)
    few = [end(begin, i, SPREAD) for i in range(8)]
    count = 1
    for width in levels:
        count *= width
    seconds, memory, results = {}, {}, {}
    for what, widths in (("one server", (count,)), ("tree", levels)):
        clients = (few[i % len(few)] for i in range(count))
        began = perf_counter()
        with Peak() as peak:
            results[what] = server(widths, begin, clients).finish(norms=False)
        seconds[what], memory[what] = perf_counter() - began, peak.bytes
    factors = len(levels) * sum(s.out * s.inp * 4 for s in shapes.values())
    title = f"A tree of servers: {count:,} clients in {' × '.join(map(str, levels))}"
    return Row(
        f"{title}, {len(shapes)} layers of RoBERTa-large, rank {RANK}",
        [
            Figure("memory, in dense sums of all levels", memory["tree"] / factors, "×", at_most=4),
            Figure("tree", seconds["tree"], "s"),
            Figure("tree, memory", memory["tree"], "B"),
            Figure("one server", seconds["one server"], "s"),
            Figure("one server, memory", memory["one server"], "B"),
            Figure("residuals differ by", difference(*results.values()), "", at_most=1e-5),
        ],
        [
            "Factors differ by a hundredth of their size. Every server takes its clients in one "
            "after the other and is then combined into the one above; once each."
        ],
    )


def server(
    widths: tuple[int, ...], begin: AdapterState, clients: Iterator[AdapterState]
) -> Aggregator:
    """The aggregate of a server's clients, or of the servers below it."""
    shapes = layers(ROBERTA_LARGE, LAYERS, RANK)
    aggregator = Aggregator(METHODS["fedex"], shapes, frozenset("AB"), clients=widths[0])
    for _ in range(widths[0]):
        if len(widths) > 1:
            aggregator.combine(server(widths[1:], begin, clients))
        else:
            aggregator.add(1.0, begin, next(clients))
    return aggregator


def difference(one: Aggregate, other: Aggregate) -> float:
    """The largest relative distance of two aggregates' residuals over the layers."""
    return max(
        ((w - other.increment[name]).norm() / w.norm()).item() for name, w in one.increment.items()
    )
