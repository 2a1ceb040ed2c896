"""What all figures of a study share: which runs are drawn, and lines with bands."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fedex_lora.experiments.analysis.plots import Series
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.study import Study
from fedex_lora.federation.record import Record

MB = 1e6
MOST = 8  # lines in a figure
OfRecord = Callable[[Record], float | None]


@dataclass(frozen=True)
class Drawn:
    """A figure, the name of its file, and what to know when looking at it.

    Attributes:
        condition: Set where a figure shows the runs of one condition only.
    """

    name: str
    figure: Figure
    caption: str
    condition: str = ""


def heading(study: Study, task: str) -> str:
    """Which runs a figure shows, for its title."""
    return ", ".join(filter(None, [task, study.condition]))


def drawn_arms(study: Study, task: str) -> Iterator[tuple[int, str, list[Run]]]:
    """Arms of a task with the runs that are drawn: finished ones, else those that have begun."""
    chosen = chosen_arms(study, task)
    for style, arm in enumerate(chosen):
        runs = [p.run for p in study.of(task, arm) if p.run.records]
        finished = [run for run in runs if run.finished]
        if runs:
            yield style, arm, finished or runs


def sending(study: Study, task: str) -> Iterator[tuple[int, str, list[Run]]]:
    """`drawn_arms` of federations: with pooled data there is nobody to send anything to."""
    pooled = {p.arm for p in study.of(task) if p.method.pooled}
    return (drawn for drawn in drawn_arms(study, task) if drawn[1] not in pooled)


def chosen_arms(study: Study, task: str) -> list[str]:
    """All arms, or as many as a figure can show: truncated residuals have a figure of their own."""
    every = study.of_arms(task)
    if len(every) <= MOST:
        return every
    cut = [arm for arm in every if study.of(task, arm)[0].method.residual == "truncated"]
    first = [arm for arm in every if arm not in cut]
    kept = [*first, *cut][:MOST]
    return [arm for arm in every if arm in kept]


def fewer_runs(study: Study, task: str) -> str:
    """Says which arms are drawn from fewer runs than others, as those of few seeds vary more."""
    counts = {arm: len(runs) for _, arm, runs in drawn_arms(study, task)}
    most = max(counts.values(), default=0)
    few = [f"{arm} ({n})" for arm, n in counts.items() if n < most]
    return f"Of fewer than {most} seeds: {', '.join(few)}." if few else ""


def by_round(runs: Sequence[Run], of: OfRecord) -> dict[int, list[float]]:
    """By round, a value a run, for rounds that all the runs have."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for record in run.records:
            value = of(record)
            if value is not None:
                found.setdefault(record["round"], []).append(value)
    return {r: values for r, values in sorted(found.items()) if len(values) == len(runs)}


def banded(
    label: str, style: int, by_x: Mapping[int, Sequence[float]] | Mapping[float, Sequence[float]]
) -> Series:
    """The mean at every x, and a band from the smallest to the largest."""
    x, values = list(by_x), list(by_x.values())
    many = any(len(v) > 1 for v in values)
    low, high = ([f(v) for v in values] if many else None for f in (min, max))
    return Series(label, x, [statistics.fmean(v) for v in values], style, low, high)
