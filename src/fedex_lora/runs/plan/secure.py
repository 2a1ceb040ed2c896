"""The size of the messages of a round in which the coordinator sees sums alone, from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedex_lora.federation.messages import Tensors
from fedex_lora.federation.secure import fixed, sums
from fedex_lora.federation.secure.graph import DEGREE
from fedex_lora.federation.secure.messages import SUMS
from fedex_lora.federation.secure.primitives import canonical
from fedex_lora.federation.secure.session import LETTER, SHARE
from fedex_lora.federation.settings import Settings

_HASH = "0" * 64  # hex digits, as of a key
_CONTEXT = f"{'0' * 32} round 1"


def numbers(
    settings: Settings, round: int, clients: Sequence[str], begun: bool, head: Tensors
) -> int:
    """How many numbers a client sends under masks.

    Args:
        begun: Whether B⁰ is not zero.

    Example:
        >>> from fedex_lora.aggregation.adapter import LayerShape
        >>> from fedex_lora.aggregation.methods import METHODS
        >>> from fedex_lora.federation.settings import Secure
        >>> layers = {"q": LayerShape(out=64, inp=48, rank=2, scale=1.0)}
        >>> s = Settings(METHODS["fedex"], 0, ("a", "b"), layers, rounds=1, secure=Secure())
        >>> numbers(s, 1, "ab", False, {})  # n, loss; A, B; Y 64 × 4 and Z (4 + 8) × 48
        1059
    """
    return sum(map(math.prod, _shapes(settings, round, clients, begun, head).values()))


def _shapes(
    settings: Settings, round: int, clients: Sequence[str], begun: bool, head: Tensors
) -> sums.Shapes:
    width = sums.widths(settings, round, clients, begun)
    return sums.shapes(settings, round, width, head)


def extra(
    settings: Settings, round: int, clients: Sequence[str], begun: bool, head: Tensors
) -> tuple[int, int]:
    """Bytes that a client sends, and that it is sent besides the broadcast: what the round loop
    counts, if names are as long as the first ones'. Exponents are taken to have three digits."""
    shapes = _shapes(settings, round, clients, begun, head)
    around = list(clients)[: DEGREE + 1]
    others = around[1:]
    keys = {label: dict.fromkeys(("mask", "channel", "seed"), _HASH) for label in SUMS}
    told = {"keys": keys, "signature": None}
    commitment = dict.fromkeys(("seed", "key"), _HASH)
    letters = dict.fromkeys(others, "0" * LETTER)
    dealt = {"letters": letters, "commitments": dict.fromkeys(around, commitment)}
    opened = {"shares": dict.fromkeys(around, "0" * SHARE)}
    up: list[Any] = [
        told,
        {"dealt": dict.fromkeys(SUMS, dealt)},
        {"start": _HASH},
        opened,
        {},
        opened,
    ]
    vectors = 8 * (numbers(settings, round, clients, begun, head) + len(shapes) * fixed.LEVELS)
    down: list[Any] = [
        {"context": _CONTEXT},
        {"everybody": dict.fromkeys(clients, told)},
        {
            "round": round,
            "letters": dict.fromkeys(SUMS, letters),
            "commitments": dict.fromkeys(SUMS, dict.fromkeys(others, commitment)),
            "widths": sums.widths(settings, round, clients, begun),
        },
        {"exponents": [-10] * len(shapes), "halvings": 0},
        *({"sum": label, "present": list(clients)} for label in SUMS),
    ]
    return vectors + sum(len(canonical(a)) for a in up), sum(len(canonical(a)) for a in down)
