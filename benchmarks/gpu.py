"""The same work on a GPU, in absolute figures: Mistral-7B's shapes, weights in bf16."""

from __future__ import annotations

import torch

from benchmarks.residual import RANK, one_layer, ours, published
from benchmarks.results import Figure, Row, seconds
from benchmarks.shapes import MISTRAL_LAYERS
from benchmarks.timing import in_turn
from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Increment

TITLE = "On a GPU: one decoder layer of Mistral-7B, rank 32, 3 clients"


def row(repeats: int = 9) -> Row:
    """Seconds on the GPU, or why there are none."""
    if not torch.cuda.is_available():
        return Row(TITLE, skipped="torch finds no GPU on this machine")
    return measured(torch.device("cuda"), repeats)


def measured(device: torch.device, repeats: int) -> Row:
    """Residual, wire form, truncation and folding with all tensors on `device`."""
    begin, ends = one_layer()
    begin, ends = _to(begin, device), [_to(e, device) for e in ends]
    residual = ours(begin, ends)
    weights = {
        n: torch.randn(f.B.shape[0], f.A.shape[1], device=device).to(torch.bfloat16)
        for n, f in begin.layers.items()
    }
    times = in_turn(
        {
            "dense formula": lambda: [published(ends, n) for n in begin.layers],
            "residual as factors": lambda: ours(begin, ends),
            "the same, deviation measured too": lambda: ours(begin, ends, norms=True),
            "the same in wire form": lambda: [w.wire_form() for w in ours(begin, ends).values()],
            "best rank-32 approximation": lambda: _truncated(residual),
            "folding the residual into weights in bf16": lambda: _folded(weights, residual),
        },
        repeats,
    )
    whole = times["the same in wire form"].median * MISTRAL_LAYERS
    note = f"The server's time for a round is that in wire form times {MISTRAL_LAYERS} layers."
    server = Figure("server time of a round, 7B", whole, "s", at_most=2)
    return Row(TITLE, [server, *seconds(times)], [note])


def _to(state: AdapterState, device: torch.device) -> AdapterState:
    return AdapterState(
        {n: Factors(f.A.to(device), f.B.to(device), f.scale) for n, f in state.layers.items()}
    )


def _truncated(residual: Increment) -> list[Delta]:
    return [w.split(RANK)[0] for w in residual.values()]


def _folded(weights: dict[str, torch.Tensor], residual: Increment) -> list[torch.Tensor]:
    return [(w.float() + residual[n].dense()).to(torch.bfloat16) for n, w in weights.items()]
