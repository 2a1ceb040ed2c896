"""The residual and its truncation against the dense formula, at Mistral-7B's shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.shapes import MISTRAL, MISTRAL_LAYERS, end, sites, start
from benchmarks.timing import Times, in_turn
from fedex_lora.adapter import AdapterState
from fedex_lora.aggregate import Aggregator, wire_form
from fedex_lora.ledger import Increment
from fedex_lora.lowrank import LowRank, dense
from fedex_lora.methods import METHODS

CLIENTS, RANK = 3, 32


def published(ends: list[AdapterState], site: str) -> Tensor:
    """Mean of the products minus product of the means, dense: as the paper's code computes it."""
    scale = ends[0].sites[site].scale
    a = torch.stack([e.sites[site].A for e in ends])
    b = torch.stack([e.sites[site].B for e in ends])
    return scale * (torch.stack([y @ x for x, y in zip(a, b)]).mean(0) - b.mean(0) @ a.mean(0))


def published_truncated(ends: list[AdapterState], site: str, rank: int) -> Tensor:
    """The dense residual's best approximation by a dense singular value decomposition."""
    u, s, vh = torch.linalg.svd(published(ends, site), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def ours(begin: AdapterState, ends: list[AdapterState]) -> Increment:
    """The residual of all sites as factors, by this project's aggregation (its norms included)."""
    shapes = {
        n: sites({"x": (f.B.shape[0], f.A.shape[1])}, 1, f.rank)["layers.0.x"]
        for n, f in begin.sites.items()
    }
    aggregator = Aggregator(METHODS["fedex"], shapes, frozenset("AB"))
    for one in ends:
        aggregator.add(1.0, begin, one)
    return aggregator.finish().increment


def read_and_write(begin: AdapterState, ends: list[AdapterState]) -> list[Tensor]:
    """Reads every input once and writes as much as the outputs hold: the least there is to do."""
    outputs = []
    for name, f in begin.sites.items():
        read = [t.sum() for e in ends for t in (e.sites[name].A, e.sites[name].B)]
        rank = (len(ends) - 1) * f.rank
        for size in (f.B.shape[0] * rank, f.A.shape[1] * rank, f.A.numel() + f.B.numel()):
            outputs.append(torch.full((size,), read[0].item()))
    return outputs


def one_layer() -> tuple[AdapterState, list[AdapterState]]:
    begin = start(sites(MISTRAL, 1, RANK))
    return begin, [end(begin, 1 + i) for i in range(CLIENTS)]


def whole_model() -> tuple[AdapterState, list[AdapterState]]:
    """All 32 layers; the factors of the layers share storage, which saves memory, not work."""
    begin, ends = one_layer()

    def repeated(state: AdapterState) -> AdapterState:
        return AdapterState(
            {
                n.replace("layers.0", f"layers.{i}"): f
                for i in range(MISTRAL_LAYERS)
                for n, f in state.sites.items()
            }
        )

    return repeated(begin), [repeated(e) for e in ends]


def times(repeats: int = 5) -> dict[str, Times]:
    """Seconds for one layer's seven sites."""
    begin, ends = one_layer()
    return in_turn(
        {
            "dense formula": lambda: [published(ends, n) for n in begin.sites],
            "as factors": lambda: ours(begin, ends),
            "in wire form": lambda: [wire_form(w) for w in ours(begin, ends).values()],
            "read and write once": lambda: read_and_write(begin, ends),
        },
        repeats,
    )


def truncation_times() -> dict[str, Times]:
    """Best rank-32 approximation at the 4096² site; the dense one is run once: it takes minutes."""
    begin, ends = one_layer()
    name = next(iter(begin.sites))
    one = [AdapterState({name: e.sites[name]}) for e in ends]
    first = AdapterState({name: begin.sites[name]})

    def truncated() -> LowRank:
        w = ours(first, one)[name]
        assert isinstance(w, LowRank)
        return w.truncate(RANK)

    theirs = in_turn({"dense SVD": lambda: published_truncated(ends, name, RANK)}, 1, False)
    return theirs | in_turn({"of the factors": truncated}, 5)


def errors(spreads: tuple[float, ...] = (1, 1e-1, 1e-2, 1e-3, 1e-4)) -> dict[float, tuple]:
    """Relative error of the residual against float64, (published, ours), by the clients' spread."""
    begin = start(sites({"x": (300, 200)}, 1, 8))
    name = next(iter(begin.sites))
    found = {}
    for spread in spreads:
        ends = [end(begin, 1 + i, spread) for i in range(5)]
        exact = _exact(ends, name)
        found[spread] = tuple(
            (torch.linalg.norm(got.double() - exact) / torch.linalg.norm(exact)).item()
            for got in (published(ends, name), dense(ours(begin, ends)[name]))
        )
    return found


def _exact(ends: list[AdapterState], site: str) -> Tensor:
    a = torch.stack([e.sites[site].A for e in ends]).double()
    b = torch.stack([e.sites[site].B for e in ends]).double()
    da, db = a - a.mean(0), b - b.mean(0)
    return ends[0].sites[site].scale * (db @ da).mean(0)
