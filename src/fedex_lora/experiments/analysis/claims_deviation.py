"""Claim 4 of the paper: how the deviation of averaging depends on depth, epochs, Q or V, rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedex_lora.experiments.analysis import deviation as dev
from fedex_lora.experiments.analysis.finding import Finding, judged
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.scores import by_task, differences
from fedex_lora.experiments.analysis.statistics import Estimate, estimate, mirrored
from fedex_lora.experiments.analysis.study import Placed, Study, deviates, is_exact_average

Rows = Mapping[int, Sequence[dev.Deviation]]  # by id of the run
Measure = Callable[[Sequence[dev.Deviation], dev.Scaling], float | None]

_EPOCHS = "training.num_train_epochs"
_TRENDS: tuple[tuple[str, Measure, bool], ...] = (  # part, measure, whether it is to be low
    ("the deviation falls with depth (after round 1)", dev.depth_trend, True),
    ("the deviation is larger in Q than in V (after round 1)", dev.query_over_value, False),
    ("the deviation falls over rounds", dev.round_trend, True),
)


def deviation_findings(study: Study) -> Iterator[Finding]:
    """Claim 4, on the runs of one method, as methods of equal seed share round 1."""
    chosen = averaging(study)
    rows = {id(p.run): dev.deviations(p.run) for p in chosen}
    scaling = dev.best_scaling(row for part in rows.values() for row in part)
    for part, measure, low in _TRENDS:
        yield _trend(part, chosen, rows, measure, scaling, low)
    yield _epochs(study, chosen, rows, scaling)


def averaging(study: Study) -> list[Placed]:
    """The runs of exact averaging; without such, of the first other method that deviates."""
    able = [p for p in study.placed if deviates(p.method) and p.method.averages]
    exact = [p for p in able if is_exact_average(p.method)]
    return exact or [p for p in able if p.method == able[0].method]


def _trend(
    part: str,
    chosen: Sequence[Placed],
    rows: Rows,
    measure: Measure,
    scaling: dev.Scaling,
    low: bool,
) -> Finding:
    e = _over_runs(chosen, rows, measure, scaling)
    if e is None:
        return Finding(4, part, "not tested", "no runs that average, with such layers or rounds")
    methods = ", ".join(dict.fromkeys(p.run.recipe.method.name for p in chosen))
    text = f"{methods}: {_ratio(e)}, of the {dev.SCALINGS[scaling]}"
    relative = _over_runs(chosen, rows, measure, "relative")
    text += f"; {_ratio(relative)} relative to the ideal" if relative else ""
    return judged(4, part, mirrored(e) if low else e, text)


def _over_runs(
    chosen: Sequence[Placed], rows: Rows, measure: Measure, scaling: dev.Scaling
) -> Estimate | None:
    """The mean of a log ratio that every run gives; tasks and seeds are the sample."""
    found: dict[tuple[str, int], list[float]] = {}
    for p in chosen:
        value = measure(rows[id(p.run)], scaling)
        if value is not None:
            found.setdefault((p.task, p.seed), []).append(value)
    return estimate(by_task(found)) if found else None


def _ratio(e: Estimate) -> str:
    """A log ratio as a ratio, with its interval."""
    text = f"ratio {math.exp(e.mean):.2f}"
    if e.interval is None:
        return f"{text} ({e.basis})"
    low, high = map(math.exp, e.interval)
    return f"{text} (95 % interval {low:.2f} to {high:.2f}; {e.basis})"


def _epochs(study: Study, chosen: Sequence[Placed], rows: Rows, scaling: dev.Scaling) -> Finding:
    part = "the deviation grows with local epochs (after round 1)"
    counts = sorted({p.settings[_EPOCHS] for p in chosen if _EPOCHS in p.settings})
    if len(counts) < 2:
        return Finding(4, part, "not tested", f"no runs that differ in {_EPOCHS}")
    few, many = counts[0], counts[-1]

    def having(epochs: float) -> Callable[[Placed], bool]:
        return lambda p: id(p.run) in rows and p.settings.get(_EPOCHS) == epochs

    def measure(run: Run) -> float | None:
        return dev.first_round(rows[id(run)], scaling)

    but = (_EPOCHS, "federation.rounds")  # the first round does not know how many follow
    found = differences(study, having(many), having(few), measure, but)
    if not found:
        return Finding(4, part, "not tested", f"no runs of equal seed that differ in {_EPOCHS}")
    e = estimate(found)
    text = f"{many} epochs over {few}: {_ratio(e)}, of the {dev.SCALINGS[scaling]}"
    return judged(4, part, e, text)
