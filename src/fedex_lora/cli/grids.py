"""The command that runs all of a grid file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedex_lora.cli.common import Out, Sets, app, complain, console, say, this_command
from fedex_lora.cli.display import show_table

if TYPE_CHECKING:
    from fedex_lora.experiments.grid.plan import Plan


@app.command()
def grid(
    file: Annotated[Path, typer.Argument(help="A grid: a YAML file with `recipes:`.")],
    set: Sets = [],  # noqa: B006
    data: Annotated[
        Path | None, typer.Option(help="Local copies of hub data: DATA/sst2, ...")
    ] = None,
    only: Annotated[str, typer.Option(help="Only these runs, e.g. 'cola-*/*-seed0'.")] = "*",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    out: Out = None,
    list_: Annotated[bool, typer.Option("--list", help="Only show what is done.")] = False,
) -> None:
    """Run every recipe, choice, method and seed of a grid file; what is done is not run again."""
    from fedex_lora.experiments.grid.plan import due, left, plan
    from fedex_lora.experiments.grid.table import write_comparison
    from fedex_lora.experiments.grid.work import work
    from fedex_lora.runs.lock import interrupted_by_signals

    found = plan(file, set, data, only)
    path = out or Path("runs") / file.stem
    if list_:
        _show(found, path)
        return
    known = due(found, path)
    todo, failed = left(known, path), dict[str, str]()
    tried = 0
    _tell(f"{len(known)} runs in {path}, {len(known) - len(todo)} of them done")
    for cell in dict.fromkeys(run.cell for run in found.runs):
        write_comparison(found, cell, path)
    try:
        with interrupted_by_signals():
            while todo and not failed:  # what they found may say what else is to be run
                tried += len(todo)
                failed = work(
                    todo,
                    path,
                    jobs,
                    _tell,
                    lambda run: write_comparison(found, run.cell, path),
                    found.grid.train_once,
                )
                todo = left(due(found, path), path)
    except KeyboardInterrupt:
        complain(f"interrupted; this goes on after the last finished rounds:\n  {this_command()}")
        raise typer.Exit(130) from None
    _show_tables(found, path / f"{file.stem}.md")
    for name, why in failed.items():
        complain(f"failed: {name}: {why}")
    if failed:
        complain(f"{len(failed)} of {tried} runs failed; the same command tries them again")
        raise typer.Exit(2)


def _tell(text: str) -> None:
    """At once, also where the output goes to a file: a grid may take days."""
    say(text)
    console.file.flush()


def _show_tables(found: Plan, path: Path) -> None:
    from fedex_lora.experiments.grid.table import write_tables

    shown = write_tables(found, path)
    for table in shown:
        say(table.title)
        show_table(console, table.header, table.rows)
    if shown:
        say(f"As Markdown: {path}; of each cell: {path.parent}/CELL/comparison.md")


def _show(found: Plan, out: Path) -> None:
    from fedex_lora.experiments.grid.plan import standing, told

    rows: dict[tuple[str, str], dict[int, str]] = {}
    for run in found.runs:
        rows.setdefault((run.cell, run.label), {})[run.seed] = told(run, out)
    seeds = sorted({run.seed for run in found.runs})
    header = ["runs", "method", *(f"seed {seed}" for seed in seeds)]
    show_table(
        console, header, [[*key, *(by.get(s, "") for s in seeds)] for key, by in rows.items()]
    )
    done = sum(standing(run, out) == "done" for run in found.runs)
    say(f"{len(found.runs)} runs in {out}, {done} of them done")
