"""Figures 2 to 9 of the paper: the deviation of averaging across layers and rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedex_lora.experiments.analysis import deviation as dev
from fedex_lora.experiments.analysis.drawn import MOST, Drawn, banded, drawn_arms, heading
from fedex_lora.experiments.analysis.plots import lines
from fedex_lora.experiments.analysis.study import Study, deviates

_WIDE = 10.0  # largest over smallest, from which on an axis is logarithmic
Arm = tuple[int, str, list[list[dev.Deviation]]]  # its style, its name, the rows of every run


def _deviating(study: Study, task: str) -> Iterator[Arm]:
    able = {p.arm for p in study.of(task) if deviates(p.method)}
    for style, arm, runs in drawn_arms(study, task):
        rows = [rows for run in runs if (rows := dev.deviations(run))]
        if arm in able and rows:
            yield style, arm, rows


def _first_arms(study: Study, task: str) -> list[Arm]:
    """Methods of equal seed and training share round 1: of each training, one method is enough."""
    every = list(_deviating(study, task))
    method = {p.arm: p.label for p in study.of(task)}
    names = [method[arm] for _, arm, _ in every]
    wanted = study.reference if study.reference in names else next(iter(names), None)
    return [one for one in every if method[one[1]] == wanted][: MOST // 2]


def _scaling(every: Iterable[Arm]) -> dev.Scaling:
    return dev.best_scaling(row for _, _, runs in every for rows in runs for row in rows)


def deviation_by_layer(study: Study, task: str) -> Drawn | None:
    """Figures 2, 4 and 5 of the paper: across layers after round 1, by kind of matrix."""
    arms = _first_arms(study, task)
    scaling = _scaling(arms)
    kinds = dev.kinds(row for _, _, runs in arms for rows in runs for row in rows)[:MOST]
    series = [
        banded(kind if len(arms) == 1 else f"{kind}: {arm}", i * len(kinds) + j, curve)
        for i, (_, arm, runs) in enumerate(arms)
        for j, kind in enumerate(kinds)
        if (curve := dev.across_layers(runs, kind, scaling))
    ]
    if not series:
        return None
    title = f"{heading(study, task)}: deviation by layer, round 1"
    figure = lines(title, "layer", _unit(scaling), series, whole=True)
    shown = ", ".join(arm for _, arm, _ in arms)
    caption = (
        "How far averaging the factors is from the ideal update after the first round (figures 2, "
        f"4, 5 of the paper), in {shown}. {_told(scaling)} The paper does not say how its norm is "
        "scaled."
    )
    return Drawn("deviation-by-layer", figure, caption)


def deviation_in_first_layer(study: Study, task: str) -> Drawn | None:
    """Figures 3 (a), 6-9 (a): the first layer's Q by round."""
    return _by_round(study, task, None, True, "deviation-first-layer")


def deviation_by_round(study: Study, task: str) -> Drawn | None:
    """Figures 3 (b), 6-9 (b): the mean of Q and V by round."""
    return _by_round(study, task, None, False, "deviation-by-round")


def relative_deviation_by_round(study: Study, task: str) -> Drawn | None:
    """The same, relative to the ideal product, which grows over rounds."""
    return _by_round(study, task, "relative", False, "relative-deviation-by-round")


def _by_round(
    study: Study, task: str, scaling: dev.Scaling | None, first: bool, name: str
) -> Drawn | None:
    arms = list(_deviating(study, task))
    rows = [row for _, _, runs in arms for part in runs for row in part]
    layers = [row.layer for row in rows if row.layer is not None]
    if not rows or (first and not layers) or max(row.round for row in rows) < 2:
        return None
    scaling = scaling or _scaling(arms)
    kinds = dev.kinds(rows)[:1] if first else dev.kinds(rows)
    layer = min(layers) if first else None
    series = [
        banded(arm, style, dev.across_rounds(runs, scaling, kinds, layer))
        for style, arm, runs in arms
    ]
    what = f"{kinds[0]} of layer {layer}" if first else f"mean of {' and '.join(kinds)}"
    title = (
        f"{heading(study, task)}: {'relative ' * (scaling == 'relative')}deviation by round, {what}"
    )
    values = [y for one in series for y in one.y]
    spread = max(values) / min(values) if min(values, default=0) > 0 else 1.0
    figure = lines(title, "round", _unit(scaling), series, whole=True, log_y=spread > _WIDE)
    caption = f"Figures 3 and 6 to 9 of the paper, ({'a' if first else 'b'}). {_told(scaling)}"
    return Drawn(name, figure, caption)


def _unit(scaling: dev.Scaling) -> str:
    units = {"absolute": "‖ideal − averaged‖", "entry": "‖ideal − averaged‖ / √(m·n)"}
    return {**units, "relative": "‖ideal − averaged‖ / ‖ideal‖"}[scaling]


def _told(scaling: dev.Scaling) -> str:
    return f"Scaling: {dev.SCALINGS[scaling]}."
