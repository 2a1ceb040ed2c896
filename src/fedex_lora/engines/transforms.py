"""What becomes of an update before it is sent: functions of its tensors, one after the other.

A transform is given the update as a drift from where the client started, so that what is clipped,
noised or rounded is what the client learned and nothing else.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping

import torch
from torch import Tensor

from fedex_lora.engines.turn import Transform, Turn
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import Tensors
from fedex_lora.recipe import Recipe


def chain(*transforms: Transform) -> Transform:
    """The transforms one after the other, the first one first.

    Example:
        >>> halved = lambda drift, turn: {name: t / 2 for name, t in drift.items()}
        >>> found = chain(halved, clip(1.0))({"A/q": torch.tensor([6.0, 8.0])}, None)
        >>> found["A/q"].tolist()  # (3, 4) has norm 5
        [0.6000000238418579, 0.800000011920929]
    """

    def chained(drift: Tensors, turn: Turn) -> Tensors:
        for transform in transforms:
            drift = transform(drift, turn)
        return drift

    return chained


def clip(most: float) -> Transform:
    """min(1, most/‖drift‖₂)·drift, the norm taken over all tensors of the update together.

    Raises:
        UserError: `most` is not above 0.
    """
    if not most > 0:
        raise UserError(f"clip: a bound of {most:g}; expected a number above 0")

    def clipped(drift: Tensors, turn: Turn) -> Mapping[str, Tensor]:
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in drift.values()]
        norm = math.hypot(*norms)
        return {name: t * (most / norm) for name, t in drift.items()} if norm > most else drift

    return clipped


def clipped(recipe: Recipe) -> Transform | None:
    """What a client does to its update where the server cannot look at single ones: it keeps to
    the bound of its norm by itself."""
    most = recipe.federation.max_norm
    return None if most is None or recipe.privacy.secure_aggregation is None else clip(most)


def gaussian_noise(deviation: float, seed: int | None = None) -> Transform:
    """drift + N(0, deviation²), independent in every entry.

    Noise that is to hide something must not be known to anybody, so its seed comes from the
    operating system's randomness and a run with it does not repeat. The generator is torch's, which
    is no cryptographic one.

    Args:
        deviation: Standard deviation, in the units of the weights. For differential privacy of a
            client it is the noise multiplier times the bound of `clip` before it.
        seed: For tests: the noise then repeats and hides nothing.

    Raises:
        UserError: `deviation` is negative or no number.
    """
    if not deviation >= 0:
        raise UserError(f"gaussian_noise: a deviation of {deviation:g}; expected 0 or more")
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)

    def noised(drift: Tensors, turn: Turn) -> Mapping[str, Tensor]:
        return {
            name: t + deviation * torch.randn(t.shape, generator=generator).to(t)
            for name, t in drift.items()
        }

    return noised
