"""The residual and its truncation against the dense formula, at Mistral-7B's shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.results import Figure, Row, seconds
from benchmarks.shapes import MISTRAL, MISTRAL_LAYERS, end, layers, start
from benchmarks.timing import Times, in_turn, ratio, timed
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Increment
from fedex_lora.aggregation.methods import METHODS

CLIENTS, RANK = 3, 32
DENSE, FACTORS, NORMS = "dense formula", "as factors", "as factors, deviation measured too"
WIRE, MINIMUM = "in wire form", "inputs read and outputs written once"


def published(ends: list[AdapterState], site: str) -> Tensor:
    """Mean of the products minus product of the means, dense: as the paper's code computes it."""
    scale = ends[0].layers[site].scale
    a = torch.stack([e.layers[site].A for e in ends])
    b = torch.stack([e.layers[site].B for e in ends])
    return scale * (torch.stack([y @ x for x, y in zip(a, b)]).mean(0) - b.mean(0) @ a.mean(0))


def published_truncated(ends: list[AdapterState], site: str, rank: int) -> Tensor:
    """The dense residual's best approximation by a dense singular value decomposition."""
    u, s, vh = torch.linalg.svd(published(ends, site), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def ours(begin: AdapterState, ends: list[AdapterState], norms: bool = False) -> Increment:
    """The residual of all layers as factors and the mean factors, by this project's aggregation.

    Args:
        norms: Whether it also measures the deviation, as a round does for its record.
    """
    shapes = {
        n: layers({"x": (f.B.shape[0], f.A.shape[1])}, 1, f.rank)["layers.0.x"]
        for n, f in begin.layers.items()
    }
    aggregator = Aggregator(METHODS["fedex"], shapes, frozenset("AB"), clients=len(ends))
    for one in ends:
        aggregator.add(1.0, begin, one)
    return aggregator.finish(norms).increment


def read_and_write(begin: AdapterState, ends: list[AdapterState]) -> list[Tensor]:
    """Reads every input once and writes as much as the outputs hold: the least there is to do."""
    outputs = []
    for name, f in begin.layers.items():
        read = [t.sum() for e in ends for t in (e.layers[name].A, e.layers[name].B)]
        rank = (len(ends) - 1) * f.rank
        for size in (f.B.shape[0] * rank, f.A.shape[1] * rank, f.A.numel() + f.B.numel()):
            outputs.append(torch.full((size,), read[0].item()))
    return outputs


def one_layer(seed: int = 0) -> tuple[AdapterState, list[AdapterState]]:
    """Where three clients start and end, for the seven linear layers of one decoder layer."""
    begin = start(layers(MISTRAL, 1, RANK), seed)
    return begin, [end(begin, 1000 * seed + 1 + i) for i in range(CLIENTS)]


def times(layers: int = MISTRAL_LAYERS) -> dict[str, Times]:
    """Seconds for each layer's seven layers, every layer with factors of its own."""
    found: dict[str, list[float]] = {}
    for layer in range(layers):
        begin, ends = one_layer(layer)
        slow = {DENSE: lambda: [published(ends, n) for n in begin.layers]}  # noqa: B023
        quick = {
            FACTORS: lambda: ours(begin, ends),  # noqa: B023
            NORMS: lambda: ours(begin, ends, norms=True),  # noqa: B023
            WIRE: lambda: [w.wire_form() for w in ours(begin, ends).values()],  # noqa: B023
            MINIMUM: lambda: read_and_write(begin, ends),  # noqa: B023
        }
        once = in_turn(slow, 1, warm_up=not layer) | in_turn(quick, 5)
        for name, one in once.items():
            found.setdefault(name, []).append(one.median)
    return {name: Times(tuple(values)) for name, values in found.items()}


def row(layers: int = MISTRAL_LAYERS) -> Row:
    """The residual of all layers against the dense formula, and against reading and writing."""
    t = times(layers)
    return Row(
        "Residual of all linear layers of Mistral-7B, rank 32, 3 clients, float32",
        [
            Figure("as factors, against the dense formula", *_ratio(t, DENSE, FACTORS), 500),
            Figure("as factors, against reading and writing", *_over(t, FACTORS), 4),
            Figure("in wire form, against the dense formula", *_ratio(t, DENSE, WIRE), 100),
            Figure("in wire form, against reading and writing", *_over(t, WIRE), 35),
            Figure("as factors with the deviation, against it", *_ratio(t, DENSE, NORMS)),
            *(Figure(f"{f.what}, one layer", f.value, f.unit, f.spread) for f in seconds(t)),
            Figure(f"in wire form, all {layers} layers", sum(t[WIRE].seconds), "s"),
        ],
        [
            f"{layers} decoder layers of 7 matrices one after the other, each with factors of its "
            "own, as the dense matrices of all do not fit in memory together: the dense formula "
            "once, then 5 times the others in turn; each layer's medians, and of these the median "
            "and spread.",
            "Reading and writing: the clients' factors once, residual and mean factors once.",
        ],
    )


def _ratio(t: dict[str, Times], slow: str, fast: str) -> tuple[float, str, float | None]:
    value, spread = ratio(t[slow], t[fast])
    return value, "×", spread


def _over(t: dict[str, Times], name: str) -> tuple[float, str, float | None, None]:
    """How many times the least time, with no lower goal."""
    return *_ratio(t, name, MINIMUM), None


def truncation() -> Row:
    """Best rank-32 approximation at a 4096² site; the dense one is run once: it takes minutes."""
    begin, ends = one_layer()
    name = next(iter(begin.layers))
    one = [AdapterState({name: e.layers[name]}) for e in ends]
    first = AdapterState({name: begin.layers[name]})

    def truncated() -> Delta:
        return ours(first, one)[name].split(RANK)[0]

    kept: list[Tensor] = []
    theirs = timed(lambda: kept.append(published_truncated(ends, name, RANK)))
    own = in_turn({"of the factors": truncated}, 9)["of the factors"]
    exact = _exact(ends, name)
    misses = [_relative(w, exact) for w in (truncated().dense(), kept[0])]
    return Row(
        "Best rank-32 approximation of the residual, one 4096 × 4096 site",
        [
            Figure("of the factors, against a dense SVD", theirs / own.median, "×", None, 1000),
            Figure("of the factors", own.median, "s", own.spread),
            Figure("residual and SVD, dense", theirs, "s"),
            Figure("what it leaves out, relative", misses[0], ""),
            Figure("what the dense SVD leaves out", misses[1], ""),
        ],
        ["Each from the clients' factors on. The dense SVD ran once."],
    )


def errors(spreads: tuple[float, ...] = (1, 1e-1, 1e-2, 1e-3, 1e-4)) -> dict[float, tuple]:
    """Relative error of the residual against float64, (published, ours), by the clients' spread."""
    begin = start(layers({"x": (300, 200)}, 1, 8))
    name = next(iter(begin.layers))
    found = {}
    for spread in spreads:
        ends = [end(begin, 1 + i, spread) for i in range(5)]
        exact = _exact(ends, name)
        residual = ours(begin, ends)[name].dense()
        found[spread] = tuple(_relative(w, exact) for w in (published(ends, name), residual))
    return found


def accuracy() -> Row:
    """Error of the residual however near the clients are to each other."""
    figures = []
    for spread, (theirs, own) in errors().items():
        figures.append(Figure(f"spread {spread:g}", own, "", at_most=1e-6))
        figures.append(Figure(f"spread {spread:g}, dense formula", theirs, ""))
    note = "5 clients, 300 × 200, rank 8; against float64, in Frobenius norm. Spread: how far "
    note += "clients differ from the start, relative to the factors."
    return Row("Relative error of the residual in float32", figures, [note])


def _relative(got: Tensor, exact: Tensor) -> float:
    return (torch.linalg.norm(got.double() - exact) / torch.linalg.norm(exact)).item()


def _exact(ends: list[AdapterState], site: str) -> Tensor:
    a = torch.stack([e.layers[site].A for e in ends]).double()
    b = torch.stack([e.layers[site].B for e in ends]).double()
    da, db = a - a.mean(0), b - b.mean(0)
    return ends[0].layers[site].scale * (db @ da).mean(0)
