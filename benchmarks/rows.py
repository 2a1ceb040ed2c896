"""The rows of the table: what measures each, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    fusing,
    generating,
    gpu,
    language,
    liars,
    masking,
    memory,
    merging,
    residual,
    rounds,
    scaling,
    tree,
    turns,
)
from benchmarks.peers import row as peers
from benchmarks.results import Row, store

NEEDS_DATA = "--data: name the directory with local copies of GLUE's cola and mrpc"


@dataclass(frozen=True)
class Given:
    """Where things lie that are not in this repository; None: they are not there."""

    data: Path | None = None
    model: Path | None = None
    chorus: Path | None = None


def rows(given: Given) -> dict[str, Callable[[], Row]]:
    """What measures each row, by name."""
    data = given.data
    return {
        "residual": residual.row,
        "accuracy": residual.accuracy,
        "truncation": residual.truncation,
        "merge": merging.row,
        "clients": scaling.row,
        "tree": tree.row,
        "cola": _with(data, lambda path: rounds.against_published("cola", path, 8)),
        "mrpc": _with(data, lambda path: rounds.against_published("mrpc", path, 2.5)),
        "peers": _with(data, lambda path: peers.row(path, given.chorus)),
        "precision": _with(data, rounds.precision),
        "round": _with(data, rounds.parts),
        "turns": _with(data, turns.row),
        "memory": memory.row,
        "language": language.row,
        "generation": _with(data, lambda path: generating.row(path, given.model)),
        "fused": _with(data, fusing.row),
        "masking": masking.row,
        "liars": liars.row,
        "gpu": gpu.row,
    }


def _with(data: Path | None, measure: Callable[[Path], Row]) -> Callable[[], Row]:
    if data is None:
        return lambda: Row("", skipped=NEEDS_DATA)
    return partial(measure, data)


def measure(name: str, given: Given, threads: int, results: Path) -> None:
    """One row, in a process of its own: what ran before leaves memory and caches behind."""
    torch.set_num_threads(threads)
    console = Console()
    console.print(f"{name} ...", style="dim")
    row = rows(given)[name]()
    if row.skipped:
        console.print(f"{name}: skipped: {row.skipped}")
    store(name, row, results, rows(given))
