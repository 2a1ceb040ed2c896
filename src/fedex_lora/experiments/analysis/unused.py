"""Rows that runs could not use, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedex_lora.experiments.analysis.runs import Run

_WHAT = {
    "left_out": "{of} were left out: too long, or of no use to the task",
    "not_asked": "{of} count as wrong: their prompt alone fills the length there is",
}


def unused(runs: Sequence[Run]) -> list[str]:
    """A sentence for every kind of rows that could not all be used; counts as they are in the runs,
    from the fewest to the most.

    Args:
        runs: Of one task.
    """
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for run in runs:
        for (rows, what), counts in _counts(run.data):
            found.setdefault((rows, what), []).append(counts)
    return [
        _WHAT[what].format(of=f"{_range(c for c, _ in n)} of {_range(t for _, t in n)} {rows}")
        for (rows, what), n in found.items()
        if any(count for count, _ in n)
    ]


def _range(counts: Iterable[int]) -> str:
    there = sorted(counts)
    return f"{there[0]}" if there[0] == there[-1] else f"{there[0]} to {there[-1]}"


def _counts(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    """(Which rows, what became of them), (how many, of how many)."""
    parts = {"training rows": data.get("training"), "rows of the clients’ own": data.get("own")}
    evaluation = data.get("evaluation")
    if isinstance(evaluation, dict):
        parts |= {f"{split} rows": {split: told} for split, told in evaluation.items()}
    for rows, part in parts.items():
        told = [t for t in part.values() if isinstance(t, dict)] if isinstance(part, dict) else []
        for what in _WHAT:
            yield (rows, what), (_sum(told, what), _sum(told, "rows"))


def _sum(told: Sequence[Mapping[str, int]], key: str) -> int:
    return sum(t.get(key, 0) for t in told)
