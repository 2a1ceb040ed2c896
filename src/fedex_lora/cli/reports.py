"""Commands that analyse runs: the report, the paper's claims, the deviation as a table."""

from __future__ import annotations

import csv
import io
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedex_lora.cli.common import app, complain, console, say
from fedex_lora.cli.display import show_table
from fedex_lora.disk import write_atomic
from fedex_lora.errors import RecipeError, StorageError

if TYPE_CHECKING:
    from fedex_lora.experiments.analysis.deviation import Deviation, Scaling

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Runs, or directories whose subdirectories are runs."),
]


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html by default.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures' files.")] = None,
    watch: Annotated[bool, typer.Option(help="Write it again until the runs are done.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Seconds between, with --watch.")] = 30,
) -> None:
    """Write one HTML page about one or several runs: verdict, tables, figures, recipe."""
    from fedex_lora.experiments.report.write import write_report

    if out is None and len(runs) > 1:
        raise RecipeError("--out: several runs were given; name the page, e.g. report.html")
    page = out or runs[0] / "report.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"--out: {page}: expected the name of a page, e.g. {page}.html")
    try:
        while True:
            placed = write_report(runs, page, plots, every if watch else None).placed
            if not watch or all(p.run.finished for p in placed):
                break
            time.sleep(every)
    except KeyboardInterrupt:
        complain(f"interrupted; {page} is as it was last written")
        raise typer.Exit(130) from None
    say(f"Report: {page}")


@app.command()
def claims(runs: Runs) -> None:
    """Hold the paper's claims against runs: holds, does not hold, not seen, or not tested."""
    from fedex_lora.experiments.analysis.claims import CLAIMS
    from fedex_lora.experiments.analysis.evidence import findings
    from fedex_lora.experiments.analysis.runs import read_runs
    from fedex_lora.experiments.analysis.study import study

    found, problems = read_runs(runs)
    placed = study(found)
    _say_notes([*problems, *placed.notes])
    results = findings(placed)
    for claim in CLAIMS:
        say(f"\n{claim.number}. {claim.text} ({claim.where})")
        parts = [f for f in results if f.claim == claim.number]
        for f in parts:
            outcome = "not tested by these runs" if f.outcome == "not tested" else f.outcome
            say(f"   {outcome}: {f.part}\n      {f.evidence}")
        if any(f.outcome == "not tested" for f in parts):
            say(f"   Needs {claim.needs}:\n      {claim.command}")
    say("\nShown by: " + shlex.join(["fedex-lora", "claims", *map(str, runs)]))


@app.command()
def deviation(
    runs: Runs,
    round: Annotated[
        int | None, typer.Option(min=1, help="After which round; the first measured if not given.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--csv", help="Every site and round.")] = None,
) -> None:
    """Show how far averaging the factors is from the ideal update, by layer and matrix."""
    from fedex_lora.experiments.analysis.deviation import SCALINGS, deviations, table
    from fedex_lora.experiments.analysis.runs import read_runs

    found, problems = read_runs(runs)
    _say_notes(problems)
    by_run = {str(run.path): rows for run in found if (rows := deviations(run))}
    if not by_run:
        raise RecipeError("no deviation is recorded in these runs: nothing was averaged in them")
    if to is not None:
        if to.exists():
            raise StorageError(f"--csv: {to} exists; name a new file")
        write_atomic(to, _csv(list(table(by_run))).encode())
        say(f"Written: {to}")
    rows = [
        [name, "-" if layer is None else str(layer), kind, *_scaled(part, SCALINGS)]
        for name, rows in by_run.items()
        for (layer, kind), part in _by_place(rows, round or rows[0].round).items()
    ]
    if not rows:
        raise RecipeError(f"--round: {round}, but no run has a record of that round")
    show_table(console, ["run", "layer", "matrix", *SCALINGS], rows)
    for scaling, meaning in SCALINGS.items():
        say(f"{scaling}: {meaning}")


def _by_place(
    rows: Sequence[Deviation], round: int
) -> dict[tuple[int | None, str], list[Deviation]]:
    places: dict[tuple[int | None, str], list[Deviation]] = {}
    for row in rows:
        if row.round == round:
            places.setdefault((row.layer, row.kind), []).append(row)
    return places


def _scaled(rows: Sequence[Deviation], scalings: Iterable[Scaling]) -> list[str]:
    """The mean over a layer's matrices of one kind, in each scaling."""
    texts = []
    for scaling in scalings:
        values = [v for row in rows if (v := row.scaled(scaling)) is not None]
        texts.append(f"{sum(values) / len(values):.3g}" if values else "-")
    return texts


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        complain(f"note: {note}")
