"""What the command `cost` shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedex_lora.aggregation.methods import METHODS, get_method
from fedex_lora.cli.common import comma_separated, console, say, whole_number
from fedex_lora.cli.display import show_table
from fedex_lora.disk import write_atomic
from fedex_lora.errors import RecipeError, StorageError, size
from fedex_lora.experiments.analysis.plots import style
from fedex_lora.experiments.compare import markdown_table
from fedex_lora.experiments.cost.cost import Cost, Shapes, Table, millions, ratio, reference
from fedex_lora.experiments.cost.plot import cost_plot
from fedex_lora.experiments.cost.table8 import (
    CONVENTION,
    READING,
    ROWS,
    compare_row,
    ratio_table,
    size_table,
)
from fedex_lora.model.architectures import count

_HEADING = "# Table 8 of the paper, recomputed"


def show(name: str, model: Shapes, compared: Sequence[Cost]) -> None:
    layers, head = model.adapted.layers, count(model.adapted.head.values())
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    adapter = model.adapted.trained - head
    say(
        f"{name}: {model.adapted.size:,} parameters; adapted: {len(layers)} layers "
        f"({', '.join(kinds)}), {adapter:,} parameters; trained in full: {head:,}"
    )
    say(f"\nParameters of one client over {compared[0].rounds} rounds")
    show_table(console, *_table(compared, "numbers", millions))
    say("\nBytes of one client, with headers")
    show_table(console, *_table(compared, "bytes", size))
    say("\nBytes of all clients")
    show_table(console, *_all_clients(compared))
    say(
        "Down is what a round made, the last round's too; what all begin with is not sent. "
        f"Ratios are to {reference()}; the model is the pretrained one, once to every client."
    )
    if any(METHODS[c.method].residual == "truncated" for c in compared):
        say(
            "What a truncated residual leaves out is carried, and what still waits is sent after "
            "the last round: less in each round, but not in all."
        )


def _table(compared: Sequence[Cost], unit: str, shown: Callable[[float], str]) -> Table:
    base = next(c for c in compared if c.method == reference())
    header = ["method", "up a round", "down a round", "total", "ratio", "with model", "ratio"]
    rows = []
    for c in compared:
        up, down, total, whole = (
            getattr(s, unit) / c.clients for s in (c.up, c.down, c.total, c.with_model)
        )
        total_of, whole_of = (
            getattr(s, unit) / base.clients for s in (base.total, base.with_model)
        )
        rows.append(
            [
                c.method,
                shown(up / c.rounds),
                shown(down / c.rounds),
                shown(total),
                ratio(total, total_of),
                shown(whole),
                ratio(whole, whole_of),
            ]
        )
    return header, rows


def _all_clients(compared: Sequence[Cost]) -> Table:
    header = ["method", "clients", "up", "down", "total", "with model"]
    rows = [
        [
            c.method,
            str(c.clients),
            *(size(s.bytes) for s in (c.up, c.down, c.total, c.with_model)),
        ]
        for c in compared
    ]
    return header, rows


def plain(name: str, model: Shapes, compared: Sequence[Cost]) -> dict[str, object]:
    return {
        "model": name,
        "parameters": model.adapted.size,
        "adapter": model.adapted.trained - count(model.adapted.head.values()),
        "head": count(model.adapted.head.values()),
        "reference": reference(),
        "costs": [asdict(c) for c in compared],
    }


def table8(out: Path | None) -> None:
    if out is not None:
        if not out.parent.is_dir():
            raise StorageError(f"--out: there is no directory {out.parent}; make it first")
        if out.is_dir() or (out.exists() and not out.read_bytes().startswith(_HEADING.encode())):
            raise RecipeError(f"--out: {out} is there and is something else; name another file")
    rows = [compare_row(row) for row in ROWS]
    say(CONVENTION.replace("`", ""))
    show_table(console, *ratio_table(rows))
    show_table(console, *size_table(rows))
    say(READING)
    if out is None:
        return
    text = f"""{_HEADING}

Written by `fedex-lora cost --table8 --out FILE`.

{CONVENTION}

{markdown_table(*ratio_table(rows))}
{markdown_table(*size_table(rows))}
{READING}
"""
    write_atomic(out, text.encode())
    say(f"Written: {out}")


def plot(directory: Path, name: str, model: Shapes, clients: str, methods: list[str]) -> None:
    numbers = sorted({whole_number(k, "--plot-clients") for k in comma_separated(clients)})
    if not numbers or numbers[0] < 1:
        raise RecipeError("--plot-clients: expected numbers of clients, each at least 1: 2,10,100")
    for method in methods:
        get_method(method)
    stem = "cost-" + "".join(c if c.isalnum() or c in "-." else "-" for c in name).strip("-")
    files = [directory / f"{stem}.{suffix}" for suffix in ("svg", "png", "json")]
    for file in files:
        if file.exists():
            raise StorageError(f"--plot: {file} is there already; name another directory")
    figure, rows = cost_plot(name, model, numbers, methods)
    _save(figure, rows, files)
    for row in rows:
        seconds = row["server_seconds"]
        server = "" if seconds is None else f", server {seconds:.3g} s"
        say(f"{row['method']}, {row['clients']} clients: {size(row['client_bytes'])} each{server}")
    say(f"Written: {', '.join(map(str, files))}")


def _save(figure: Figure, rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    directory = files[0].parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with style():
            for file in files[:2]:
                figure.savefig(file, dpi=150)
    except OSError as error:
        raise StorageError(f"--plot: {directory}: cannot be written: {error.strerror}") from None
    write_atomic(files[2], json.dumps(list(rows), indent=1).encode())
