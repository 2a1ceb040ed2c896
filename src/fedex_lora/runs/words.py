"""Numbers for people."""

from __future__ import annotations


def size(count: float) -> str:
    """A number of bytes.

    Example:
        >>> size(0), size(1234), size(5_000_000)
        ('0', '1.2 kB', '5.0 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f}"


def number(value: float | None, digits: int = 4) -> str:
    """A score; "-" for one that is no finite number."""
    return "-" if value is None else f"{value:.{digits}f}"
