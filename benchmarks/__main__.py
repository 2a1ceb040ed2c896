"""Measures what this project promises about speed and memory, against what one would use instead.

    make bench DATA=DIR                                    # all rows; DIR holds cola and mrpc
    python -m benchmarks residual merge --threads 2        # some rows

Every row's result goes into benchmarks/results.json in place of its old one, so that a long table
can be measured piece by piece. `python -m benchmarks.page` makes docs/benchmarks.md of it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import fusing, gpu, memory, merging, residual, rounds, scaling
from benchmarks.results import RESULTS, Row, goal, read, row_of, shown, store
from fedex_lora.display import show_table

NEEDS_DATA = "--data: name the directory with local copies of GLUE's cola and mrpc"


def rows(data: Path | None) -> dict[str, Callable[[], Row]]:
    """What measures each row, by name."""
    return {
        "residual": residual.row,
        "accuracy": residual.accuracy,
        "truncation": residual.truncation,
        "merge": merging.row,
        "clients": scaling.row,
        "cola": _with(data, lambda path: rounds.against_published("cola", path, 8)),
        "mrpc": _with(data, lambda path: rounds.against_published("mrpc", path, 2.5)),
        "precision": _with(data, rounds.precision),
        "round": _with(data, rounds.parts),
        "memory": memory.row,
        "fused": _with(data, fusing.row),
        "gpu": gpu.row,
    }


def _with(data: Path | None, measure: Callable[[Path], Row]) -> Callable[[], Row]:
    if data is None:
        return lambda: Row("", skipped=NEEDS_DATA)
    return partial(measure, data)


def main() -> None:
    known = rows(None)
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(known)}; or all")
    parser.add_argument("--data", type=Path, help="directory with cola and mrpc")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    unknown = sorted(set(asked.rows) - set(known))
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; known: {', '.join(known)}")
    torch.set_num_threads(asked.threads)
    console = Console()
    for name in asked.rows or known:
        console.print(f"{name} ...", style="dim")
        row = rows(asked.data)[name]()
        if row.skipped:
            console.print(f"{name}: skipped: {row.skipped}")
        store(name, row, asked.results, known)
    show(console, asked.results)


def show(console: Console, path: Path) -> None:
    """The table of everything measured so far."""
    lines = []
    for entry in read(path).values():
        row = row_of(entry)
        lines.append([row.title, "", "", ""])
        lines += [
            [f"  {f.what}", shown(f), "" if f.spread is None else f"{f.spread:.0%}", goal(f)]
            for f in row.figures
        ]
    show_table(console, ["", "median", "spread", "goal"], lines)


if __name__ == "__main__":
    main()
