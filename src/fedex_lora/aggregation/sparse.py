"""A sparse change of a whole weight: its values at places that everybody knows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fedex_lora.aggregation.seeding import derive


def sparse_name(layer: str) -> str:
    """What the values of a layer's sparse change are called in the head, while they are trained."""
    return f"{layer}.sparse"


def spread(layer: str, out: int, inp: int, values: Tensor) -> Tensor:
    """The change as a matrix, out × in, with `values` at the layer's places and zeros elsewhere.

    Places are drawn without replacement, a function of the layer's name, its size and their number.

    Example:
        >>> d = spread("q", 2, 3, torch.tensor([5.0, 7.0]))
        >>> d.shape, sorted(d.flatten().tolist())
        (torch.Size([2, 3]), [0.0, 0.0, 0.0, 0.0, 5.0, 7.0])
    """
    places = _places(layer, out * inp, len(values)).to(values.device)
    return values.new_zeros(out * inp).index_put((places,), values).view(out, inp)


@cache
def _places(layer: str, size: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive(0, "places", layer, size, count))
    return torch.randperm(size, generator=generator)[:count].sort().values
