"""Shapes and synthetic factors: no weights are needed to time the aggregation."""

from __future__ import annotations

import torch

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape

# out × in of one decoder layer of Mistral-7B (arXiv 2310.06825; 8 key-value heads of 128)
MISTRAL = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
MISTRAL_LAYERS = 32
ROBERTA_LARGE = {"query": (1024, 1024), "value": (1024, 1024)}
ROBERTA_LARGE_LAYERS = 24


def layers(shapes: dict[str, tuple[int, int]], count: int, rank: int) -> dict[str, LayerShape]:
    """The adapted layers of `count` decoder or encoder layers."""
    return {
        f"layers.{i}.{name}": LayerShape(out, inp, rank, 2.0)
        for i in range(count)
        for name, (out, inp) in shapes.items()
    }


def start(layers: dict[str, LayerShape], seed: int = 0) -> AdapterState:
    """Random factors; B is not zero, as after a round or two."""
    g = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            name: Factors(
                torch.randn(s.rank, s.inp, generator=g),
                torch.randn(s.out, s.rank, generator=g),
                2.0,
            )
            for name, s in layers.items()
        }
    )


def end(state: AdapterState, seed: int, spread: float = 0.1) -> AdapterState:
    """Where a client ended: its factors differ from the start by `spread` of their size."""
    g = torch.Generator().manual_seed(seed)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t + spread * torch.randn(t.shape, generator=g)

    return AdapterState(
        {n: Factors(moved(f.A), moved(f.B), f.scale) for n, f in state.layers.items()}
    )
