"""With whom a client shares masks: with all, or along a regular graph where they are many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedex_lora.federation.secure.primitives import commitment

DEGREE = 32


def neighbours(names: Iterable[str], draw: str, degree: int = DEGREE) -> Mapping[str, list[str]]:
    """Each client's neighbours, sorted, without itself.

    Up to degree + 1 clients all are. Above, they stand in a circle in an order that `draw` decides,
    and the `degree` nearest are neighbours, so that what a client does no longer grows with their
    number (Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS
    2020, doi 10.1145/3372297.3417885).

    Args:
        draw: What nobody could choose: a digest of all keys.
        degree: Even.

    Example:
        >>> neighbours("abc", "")["b"]
        ['a', 'c']
        >>> {len(found) for found in neighbours(map(str, range(9)), "x", degree=4).values()}
        {4}
    """
    names = sorted(names)
    if len(names) <= degree + 1:
        return {name: [other for other in names if other != name] for name in names}
    circle = sorted(names, key=lambda name: commitment("circle", draw, name))
    steps = [s for s in range(-(degree // 2), degree // 2 + 1) if s]
    return {
        name: sorted(circle[(i + s) % len(circle)] for s in steps) for i, name in enumerate(circle)
    }


def least(neighbourhood: int, everybody: int, threshold: int | None) -> int:
    """How many of a client's neighbourhood, itself among them, must stay: more than half.

    Two halves cannot be told two stories of a client then: that it is there, and that it is not.

    Args:
        threshold: Of everybody; None for as few as there may be.

    Example:
        >>> least(3, 3, None), least(33, 100, None), least(33, 100, 90)
        (2, 17, 30)
    """
    half = neighbourhood // 2 + 1
    return half if threshold is None else max(half, -(-threshold * neighbourhood // everybody))
