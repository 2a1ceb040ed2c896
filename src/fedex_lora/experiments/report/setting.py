"""What was compared, and what it cost, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from fedex_lora.experiments.analysis.scores import bytes_ratio, bytes_sent, comparisons
from fedex_lora.experiments.analysis.statistics import number
from fedex_lora.experiments.analysis.study import Study
from fedex_lora.experiments.report.html import Html, el
from fedex_lora.runs.words import size

_MOST = 12  # arms that are named


def compared(study: Study, task: str) -> Html:
    """The methods, the data, the federation and the seeds of a task's runs, in a sentence."""
    placed = study.of(task)
    recipes = [p.run.recipe for p in placed]
    parts = [
        _values((r.federation.clients for r in recipes), "client"),
        _values((r.federation.rounds for r in recipes), "round"),
        _values((r.training.get("num_train_epochs") for r in recipes), "local epoch"),
        _values((p.seed for p in placed), "seed", count=True),
    ]
    rows = next((p.run.description for p in placed if p.run.description), None)
    every = study.of_arms(task)
    arms = ", ".join(every) if len(every) <= _MOST else f"{len(every)} arms"
    told = f" on {without_folder(rows)}" if rows else ""
    text = f"{task}: {arms}{told}; {', '.join(filter(None, parts))}."
    return el("p", text, class_="soft")


def _values(values: Iterable[Any], what: str, count: bool = False) -> str:
    """`3 or 6 clients`; nothing where it is not known. With `count`, how many there are."""
    there = list(dict.fromkeys(v for v in values if v is not None))
    shown = str(len(there)) if count else " or ".join(map(str, there))
    return f"{shown} {what}{'s' * (shown != '1')}" if there else ""


def without_folder(description: str) -> str:
    """A description of data without the directory that they were in.

    Example:
        >>> without_folder("/my/data/sst2, train: 500 rows")
        'sst2, train: 500 rows'
    """
    first, comma, rest = description.partition(",")
    return Path(first).name + comma + rest


def cost(study: Study, task: str) -> Iterator[Html]:
    """Bytes of a run of the reference, and of the others as multiples: a term and its definition.

    Where the data are pooled nothing but the data would be sent, which is not counted.
    """
    first = study.first
    runs = [p.run for p in study.of(task) if first in (p.arm, p.label) and p.run.finished]
    if not runs or not any(map(bytes_sent, runs)):
        return
    pooled = {name for p in study.of(task) if p.method.pooled for name in (p.arm, p.label)}
    others = [one.ours for one in comparisons(study, task) if one.ours not in pooled]
    told = [f"{study.in_short(first)} {size(fmean(map(bytes_sent, runs)))}"]
    told += [_beside(study.in_short(n), bytes_ratio(study, n, task)) for n in others]
    yield el("dt", "bytes of a run")
    yield el("dd", el("ul", *(el("li", one) for one in told)))


def _beside(name: str, ratio: float | None) -> str:
    return f"{name} none" if ratio is None else f"{name} × {number(ratio, digits=2)}"
