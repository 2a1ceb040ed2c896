"""Many names or numbers in one line that people can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MOST = 8


def some(names: Iterable[str], most: int = MOST) -> str:
    """The names, or the first of them and how many more there are.

    Example:
        >>> some("abc"), some("abcdef", 3)
        ('a, b, c', 'a, b, c and 3 more')
    """
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def tally(counts: Mapping[str, int], most: int = MOST) -> str:
    """Counts by name; of many, their range and their sum.

    Example:
        >>> tally({"a": 3, "b": 40}), tally({str(i): 10 * i for i in range(1, 101)})
        ('a: 3, b: 40', '100 clients with 10 to 1,000, 50,500 in all')
    """
    if len(counts) <= most:
        return ", ".join(f"{name}: {count}" for name, count in counts.items())
    least, largest = min(counts.values()), max(counts.values())
    span = f"{least:,}" if least == largest else f"{least:,} to {largest:,}"
    return f"{len(counts)} clients with {span}, {sum(counts.values()):,} in all"
