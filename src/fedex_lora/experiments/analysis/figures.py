"""The figures of a study: from runs to plots, each with what it shows in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from fedex_lora.experiments.analysis.drawn import (
    MB,
    MOST,
    Drawn,
    banded,
    by_round,
    drawn_arms,
    fewer_runs,
    heading,
    sending,
)
from fedex_lora.experiments.analysis.figures_deviation import (
    deviation_by_layer,
    deviation_by_round,
    deviation_in_first_layer,
    relative_deviation_by_round,
)
from fedex_lora.experiments.analysis.figures_tradeoff import bytes_by_round, ranks, truncation
from fedex_lora.experiments.analysis.plots import BANDS, Bar, Series, intervals, lines
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.scores import OWN_ROWS, against_reference, judged_split
from fedex_lora.experiments.analysis.study import Study, metric_of
from fedex_lora.federation.record import Record

_FACETS = 6  # conditions whose curves are drawn


def of_task(study: Study, task: str) -> list[Drawn]:
    """Every figure that the runs of one task have something to show in.

    Where there are more arms than lines in a figure, curves are drawn for each condition apart.
    """
    makers = (differences, deviation_by_layer, ranks, truncation)
    whole = [drawn for make in makers if (drawn := make(study, task)) is not None]
    facets = list(study.facets(task).values())
    if len(facets) == 1 or len(study.of_arms(task)) <= MOST:
        compared = [drawn for drawn in whole if drawn.name == "differences"]
        return [*compared, *_curves(study, task), *whole[len(compared) :]]
    for number, facet in enumerate(facets[:_FACETS], start=1):
        for one in _curves(facet, task):
            whole.append(replace(one, name=f"{one.name}-{number}", condition=facet.condition))
    return whole


def _curves(study: Study, task: str) -> list[Drawn]:
    makers = (
        score_by_round,
        score_by_bytes,
        losses,
        deviation_in_first_layer,
        deviation_by_round,
        relative_deviation_by_round,
        bytes_by_round,
    )
    arms = len(study.of_arms(task))
    told = f" Drawn are {MOST} of {arms} arms." if arms > MOST else ""
    made = [drawn for make in makers if (drawn := make(study, task)) is not None]
    return [replace(one, caption=(one.caption + told).strip()) for one in made]


def _score(record: Record) -> float | None:
    return record.get("score")


def _score_label(study: Study, task: str) -> str:
    """What the score that selects the best round is of."""
    runs = [p.run for p in study.of(task)]
    splits = [s for run in runs for r in run.records for s in r.get("scores") or {}]
    return f"{splits[0] if splits else OWN_ROWS} {metric_of(runs[0])[0]}"


def _seeds_told(series: Sequence[Series]) -> str:
    if all(one.low is None for one in series):
        return ""
    bands = ", bands reach from the lowest to the highest" if len(series) <= BANDS else ""
    return f"Lines are means over seeds{bands}."


def score_by_round(study: Study, task: str) -> Drawn | None:
    """The score that selects the best round, by round."""
    series = [
        banded(arm, style, scores)
        for style, arm, runs in drawn_arms(study, task)
        if (scores := by_round(runs, _score))
    ]
    if not series:
        return None
    label = _score_label(study, task)
    figure = lines(f"{heading(study, task)}: score by round", "round", label, series, whole=True)
    caption = f"{_seeds_told(series)} {fewer_runs(study, task)}".strip()
    return Drawn("score-by-round", figure, caption)


def score_by_bytes(study: Study, task: str) -> Drawn | None:
    """The same score by the bytes that crossed the wire until then."""
    series = []
    for style, arm, runs in sending(study, task):
        sent = [
            dict(zip((r["round"] for r in run.records), accumulate(run.bytes_by_round())))
            for run in runs
        ]
        by_bytes = {
            statistics.fmean(s[round] for s in sent) / MB: values
            for round, values in by_round(runs, _score).items()
        }
        if max(by_bytes, default=0) > 0:
            series.append(banded(arm, style, by_bytes))
    if not series:
        return None
    smallest, largest = min(s.x[0] for s in series), max(s.x[-1] for s in series)
    figure = lines(
        f"{heading(study, task)}: score by bytes",
        "MB up and down, all clients together",
        _score_label(study, task),
        series,
        log_x=smallest > 0 and largest > 30 * smallest,
    )
    caption = (
        "Left out are arms that exchange nothing or pool the data, and the delivery of the final "
        "model."
    )
    caption = f"{caption} {fewer_runs(study, task)}".strip()
    return Drawn("score-by-bytes", figure, caption)


def differences(study: Study, task: str) -> Drawn | None:
    """Every arm's paired difference from the reference, with its interval."""
    styles = {arm: style for style, arm in enumerate(study.of_arms(task))}
    bars = []
    for arm in study.of_arms(task):
        one = against_reference(study, arm, task)
        if one is not None:
            low, high = one.difference.interval or (None, None)
            bars.append(Bar(arm, one.difference.mean, low, high, styles[arm]))
    if not bars:
        return None
    label = judged_split(next(p.run for p in study.of(task) if p.run.finished))
    figure = intervals(
        f"{heading(study, task)}: difference from {study.first}", f"{label}, 95 % interval", bars
    )
    caption = (
        "Runs of equal seed are paired. An interval that holds 0 shows no difference; a mark "
        "without a line has no spread to judge by."
    )
    return Drawn("differences", figure, caption)


def losses(study: Study, task: str) -> Drawn | None:
    """Every client's training loss by round, in the reference arm."""
    arm = study.main_arm(task)
    runs = next((runs for _, name, runs in drawn_arms(study, task) if name == arm), [])
    clients = sorted({c for run in runs for r in run.records for c in r["clients"]})
    if not clients:
        return None
    if len(clients) > MOST:
        series = [banded("median, smallest, largest", 0, _spread_of_losses(runs))]
    else:
        series = [
            banded(
                client,
                style,
                by_round(runs, lambda r, c=client: r["clients"].get(c, {}).get("loss")),
            )
            for style, client in enumerate(clients)
        ]
    title = f"{heading(study, task)}: training loss by client, {arm}"
    figure = lines(title, "round", "mean training loss", [s for s in series if s.x], whole=True)
    return Drawn("client-losses", figure, _seeds_told(series))


def _spread_of_losses(runs: Sequence[Run]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in (r for run in runs for r in run.records):
        values = [c["loss"] for c in record["clients"].values() if c.get("loss") is not None]
        found.setdefault(record["round"], []).extend(values)
    return {r: [min(v), statistics.median(v), max(v)] for r, v in sorted(found.items()) if v}
