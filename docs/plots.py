"""Measures and draws docs/plots.svg: `.venv/bin/python docs/plots.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.methods import METHODS

SITE = LayerShape(out=768, inp=512, rank=4, scale=2.0)
SPREADS = [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
CLIENTS = 5


def errors(spread: float) -> tuple[float, float]:
    """Relative float32 errors of the residual: mean of products minus product of means, ours."""
    g = torch.Generator().manual_seed(0)
    start = Factors(torch.randn(4, 512, generator=g), torch.randn(768, 4, generator=g), 2.0)
    ends = [
        Factors(
            start.A + spread * torch.randn(4, 512, generator=g),
            start.B + spread * torch.randn(768, 4, generator=g),
            2.0,
        )
        for _ in range(CLIENTS)
    ]
    exact = published(ends, torch.float64)
    aggregator = Aggregator(METHODS["fedex"], {"q": SITE}, frozenset("AB"))
    for end in ends:
        aggregator.add(1, AdapterState({"q": start}), AdapterState({"q": end}))
    ours = aggregator.finish().increment["q"].dense()
    both = (published(ends, torch.float32), ours)
    return tuple(((r.double() - exact).norm() / exact.norm()).item() for r in both)  # type: ignore


def published(ends: list[Factors], dtype: torch.dtype) -> torch.Tensor:
    a, b = (torch.stack([getattr(f, x).to(dtype) for f in ends]) for x in "AB")
    return 2.0 * ((b @ a).mean(0) - b.mean(0) @ a.mean(0))


def draw_errors(axes: Axes) -> None:
    old, ours = zip(*(errors(s) for s in SPREADS))
    axes.loglog(SPREADS, old, "o-", label="mean of products − product of means")
    axes.loglog(SPREADS, ours, "o-", label="fedex-lora")
    axes.invert_xaxis()
    axes.set(xlabel="how far clients differ (drift / size of the factors)")
    axes.set(title="Relative error of the residual, float32")
    axes.legend()


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw_errors(axes)
    figure.savefig(Path(__file__).with_name("plots.svg"))
    for spread in SPREADS:
        print(f"spread {spread:g}: published {errors(spread)[0]:.1e}, ours {errors(spread)[1]:.1e}")
