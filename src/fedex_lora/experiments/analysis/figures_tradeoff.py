"""Figures of what accuracy, rank and bytes cost each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fedex_lora.experiments.analysis.drawn import MB, Drawn, heading, sending
from fedex_lora.experiments.analysis.plots import Series, lines, panels
from fedex_lora.experiments.analysis.scores import final_score, judged_split, scores_by
from fedex_lora.experiments.analysis.stacking import stacked_like
from fedex_lora.experiments.analysis.study import Study, deviates
from fedex_lora.experiments.analysis.truncation import CutPoint, cut_points

FEW = 3  # seeds, below which an interval hides everything else in a figure


def truncation(study: Study, task: str) -> Drawn | None:
    """What is left out, bytes and score against the rank of the residual, in one figure."""
    points = cut_points(study, task)
    if not points:
        return None
    ends = [p for p in points if not p.curve]
    curves = list(dict.fromkeys(p.curve for p in points if p.curve))
    label = next((judged_split(p.run) for p in study.of(task) if p.run.finished), "score")
    measures: tuple[tuple[str, Callable[[CutPoint], float | None]], ...] = (
        ("left out / residual", lambda p: p.left_out),
        ("MB down", lambda p: p.bytes_down / MB),
        (label, lambda p: p.score),
    )
    parts: list[tuple[str, list[Series]]] = [(y_label, []) for y_label, _ in measures]
    for style, curve in enumerate(curves):
        own = {p.rank for p in points if p.curve == curve}
        # the ends are those of other methods where the curve has none of its own
        whole = [p for p in points if p.curve == curve or (not p.curve and p.rank not in own)]
        for (_, of), (_, series) in zip(measures, parts):
            known = [(p.rank, value) for p in whole if (value := of(p)) is not None]
            series.append(Series(curve, [x for x, _ in known], [y for _, y in known], style))
    seeds = sorted({p.seeds for p in points})
    means = "" if seeds == [1] else f"Means over {' or '.join(map(str, seeds))} seeds."
    told = ", ".join(f"r' = {p.rank} is {p.arm}" for p in ends)
    figure = panels(f"{heading(study, task)}: the residual cut to rank r'", "r'", parts)
    caption = (
        "‖left out‖ / ‖residual‖ is the mean over the rounds before the last; with carry it is all "
        f"that waits on the server. {told}. {means}"
    )
    return Drawn("truncation", figure, caption)


def ranks(study: Study, task: str) -> Drawn | None:
    """Table 9 of the paper: the score by LoRA's rank, of what ran at several."""
    every = [g for g in scores_by(study, "lora.r") if g.task == task]
    tried = Counter(g.label for g in every)
    groups = [g for g in every if tried[g.label] > 1]
    if not groups:
        return None
    series = []
    for style, label in enumerate(dict.fromkeys(g.label for g in groups)):
        points = sorted((g for g in groups if g.label == label), key=lambda g: g.value)
        x, e = [p.value for p in points], [p.score for p in points]
        known = all(one.interval and one.seeds >= FEW for one in e)
        low, high = (
            ([one.interval[i] for one in e if one.interval] if known else None) for i in (0, 1)
        )
        series.append(Series(label, x, [one.mean for one in e], style, low, high))
    label = next(judged_split(p.run) for p in study.of(task) if final_score(p.run) is not None)
    figure = lines(f"{heading(study, task)}: score by rank", "r of LoRA", label, series)
    banded = any(one.low for one in series)
    told = "Bands: 95 % intervals of the mean over seeds." if banded else "Means over seeds."
    return Drawn("score-by-rank", figure, told)


def bytes_by_round(study: Study, task: str) -> Drawn | None:
    """Measured bytes of a round, and what stacking the factors would cost, computed."""
    series = []
    for style, arm, runs in sending(study, task):
        totals = {
            r["round"]: size / MB for r, size in zip(runs[0].records, runs[0].bytes_by_round())
        }
        if max(totals.values()) > 0:
            series.append(Series(arm, list(totals), list(totals.values()), style))
    stacking = _stacking(study, task)
    if not series or stacking is None:
        return None
    figure = lines(
        f"{heading(study, task)}: bytes of a round",
        "round",
        "MB up and down",
        [*series, stacking],
        whole=True,
        log_y=True,
    )
    caption = (
        "Measured, but for stacking (computed, without headers): the alternative that section 2 "
        "of the paper rejects, where clients go on training the stacked factors, whose rank grows "
        "by the factor k every round."
    )
    return Drawn("bytes-by-round", figure, caption)


def _stacking(study: Study, task: str) -> Series | None:
    """Stacking like the first run whose clients train both factors together."""
    able = [p for p in study.of(task) if deviates(p.method)]
    rounds = next((found for p in able if (found := stacked_like(p.run))), None)
    if rounds is None:
        return None
    x, y = [s.round for s in rounds], [s.bytes / MB for s in rounds]
    return Series("stacking (computed)", x, y, len(study.of_arms(task)))
