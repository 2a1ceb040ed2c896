"""What a grid found: a comparison for every cell, and the tables of all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedex_lora.disk import write_atomic
from fedex_lora.experiments.analysis.scores import scores_by_split
from fedex_lora.experiments.analysis.statistics import spread
from fedex_lora.experiments.compare import Results, markdown_table, save_results
from fedex_lora.experiments.grid.plan import Plan, Run
from fedex_lora.experiments.grid.spec import RECIPES
from fedex_lora.runs.rundir import RunDir

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def read_results(runs: Sequence[Run], out: Path) -> dict[str, Result]:
    """What results.json says, by run; of finished runs only."""
    read = {run.name: RunDir(out / run.name).results() for run in runs}
    return {name: result for name, result in read.items() if result is not None}


def write_comparison(plan: Plan, cell: str, out: Path) -> None:
    """A cell's finished runs as comparison.json and comparison.md, as `compare` writes them.

    What `compare` put there of other methods and seeds stays.
    """
    runs = [run for run in plan.runs if run.cell == cell]
    found = read_results(runs, out)
    known: Results = RunDir(out / cell).comparison()
    results: Results = {}
    for label in dict.fromkeys([*(run.label for run in runs), *known]):
        by_seed = {r["seed"]: r for r in known.get(label, [])}
        by_seed |= {
            r.seed: dict(found[r.name]) for r in runs if r.label == label if r.name in found
        }
        results[label] = [by_seed[seed] for seed in sorted(by_seed)]
    if any(results.values()):
        save_results(out / cell, results)


def tables(plan: Plan, out: Path) -> list[Table]:
    """Means over the seeds at the best round.

    With `columns` a table for each evaluation split: rows are methods, columns the choices on
    that axis (and their mean, if they are data sets or models or named: not if they are values of
    one key). Without, one table: columns are splits and metrics. Fewer runs than seeds are told.
    """
    results = read_results(plan.runs, out)
    if not results:
        return []
    across = plan.grid.columns
    if across is None:
        return [_metrics(plan, results)]
    splits = list(dict.fromkeys(s for r in results.values() for s in scores_by_split(r)))
    return [_across(plan, results, across, split) for split in splits]


def markdown(found: Sequence[Table]) -> str:
    return "\n".join(f"**{t.title}**\n\n{markdown_table(t.header, t.rows)}" for t in found)


def write_tables(plan: Plan, path: Path) -> list[Table]:
    """Writes the tables as Markdown to `path`, which lies in the grid's directory."""
    found = tables(plan, path.parent)
    if found:
        write_atomic(path, markdown(found).encode())
    return found


def _metrics(plan: Plan, results: Mapping[str, Result]) -> Table:
    pairs = list(
        dict.fromkeys(
            (split, metric)
            for result in results.values()
            for split, scores in scores_by_split(result).items()
            for metric in scores
            if metric != "loss"
        )
    )
    rows = [
        [*key, *(_cell(runs, results, lambda r, p=pair: _score(r, *p)) for pair in pairs)]
        for key, runs in _rows(plan, None).items()
    ]
    header = [*_named_axes(plan, None), "method", *(" ".join(pair) for pair in pairs)]
    return Table("at the best round", header, rows)


def _across(plan: Plan, results: Mapping[str, Result], axis: str, split: str) -> Table:
    choices = list(dict.fromkeys(run.choice[axis] for run in plan.runs))
    mean = len(choices) > 1 and not isinstance(plan.grid.vary.get(axis), list)

    def score(result: Result) -> float | None:
        return _score(result, split, result["metric"])

    rows = []
    for key, runs in _rows(plan, axis).items():
        columns = [[run for run in runs if run.choice[axis] == choice] for choice in choices]
        row = [*key, *(_cell(column, results, score) for column in columns)]
        rows.append([*row, _mean(columns, results, score)] if mean else row)
    names = sorted({r["metric"] for r in results.values()})
    header = [*_named_axes(plan, axis), "method", *choices, *(["mean"] if mean else [])]
    return Table(f"{split}: {', '.join(names)} at the best round", header, rows)


def _rows(plan: Plan, across: str | None) -> dict[tuple[str, ...], list[Run]]:
    """The runs of each row, by its choices on the axes that go down, and its method."""
    rows: dict[tuple[str, ...], list[Run]] = {}
    down = _named_axes(plan, across)
    for run in plan.runs:
        rows.setdefault((*(run.choice[axis] for axis in down), run.label), []).append(run)
    return rows


def _named_axes(plan: Plan, across: str | None) -> list[str]:
    """The axes that go down the table; the recipes only where there are several."""
    several = len(plan.grid.recipes) > 1
    return [a for a in (RECIPES, *plan.grid.vary) if a != across and (several or a != RECIPES)]


def _score(result: Result, split: str, metric: str) -> float | None:
    return scores_by_split(result).get(split, {}).get(metric)


def _cell(
    runs: Sequence[Run], results: Mapping[str, Result], score: Callable[[Result], float | None]
) -> str:
    found = [score(results[run.name]) for run in runs if run.name in results]
    if not found:
        return "-"
    few = f" ({len(found)} of {len(runs)})" if len(found) < len(runs) else ""
    return spread(found) + few


def _mean(
    columns: Sequence[Sequence[Run]],
    results: Mapping[str, Result],
    score: Callable[[Result], float | None],
) -> str:
    """The mean over all columns; "-" unless each has all of its runs."""
    found = [
        [score(results[r.name]) if r.name in results else None for r in column]
        for column in columns
    ]
    if any(value is None for values in found for value in values):
        return "-"
    means = [statistics.mean(v for v in values if v is not None) for values in found]
    return f"{statistics.mean(means):.3f}"
