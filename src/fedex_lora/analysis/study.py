"""Runs side by side: which tasks they are of, and which arms of an experiment they are.

Runs belong to one task if they have the same task, data and model. Within a task, runs that
differ in their seed alone are one arm, named after the method and whatever else varies.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedex_lora.analysis.runs import Run
from fedex_lora.errors import UserError
from fedex_lora.methods import METHODS, Method
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import leaves
from fedex_lora.setup import recipe_task

_TASK = ("task.", "data.", "model.name", "model.revision")  # makes scores incomparable
_NO_TREATMENT = ("name", "seed", "engine.", "records.", "evaluation.", "model.device")
_LOGGING = ("training.report_to", "training.logging", "training.run_name")


@dataclass(frozen=True)
class Placed:
    """A run and its place among the others.

    Attributes:
        task: Name of the task and data, the same for all runs whose scores may be compared.
        settings: The recipe's keys that vary among runs of a task, beside the method's.
    """

    run: Run
    task: str
    settings: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.run.recipe.seed

    @property
    def method(self) -> Method:
        return METHODS[self.run.recipe.method.name]

    @property
    def arm(self) -> str:
        """E.g. "fedex-svd:8 without carry, r 4"."""
        return ", ".join([method_label(self.run.recipe), *shown(self.settings)])

    def others(self, *but: str) -> Hashable:
        """The varying settings except those that begin with `but`: what must be equal in a pair."""
        kept = (
            {k: v for k, v in self.settings.items() if not k.startswith(but)}
            if but
            else {**self.settings}
        )
        return json.dumps(kept, sort_keys=True)


@dataclass(frozen=True)
class Study:
    """All runs, placed.

    Attributes:
        notes: What people should know before they compare: other data, runs given twice.
    """

    placed: tuple[Placed, ...]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(p.task for p in self.placed))

    @property
    def arms(self) -> list[str]:
        """In the order of the methods' table, then of the settings."""
        first = {p.arm: p for p in reversed(self.placed)}
        return sorted(first, key=lambda arm: _rank(first[arm]))

    @property
    def reference(self) -> str:
        """The arm that others are compared with: exact averaging if it is there, else the first."""
        exact = [p.arm for p in self.placed if is_exact_average(p.method)]
        return next((arm for arm in self.arms if arm in exact), self.arms[0])

    def of(self, task: str | None = None, arm: str | None = None) -> list[Placed]:
        """The runs of one task, of one arm, or both, by seed."""
        found = [p for p in self.placed if task in (None, p.task) and arm in (None, p.arm)]
        return sorted(found, key=lambda p: p.seed)


def is_exact_average(method: Method) -> bool:
    """Whether clients get the mean factors and the whole residual goes into the base."""
    return (method.assignment, method.residual) == ("average", "exact") and not method.pooled


def deviates(method: Method) -> bool:
    """Whether averaging its factors would miss anything: several clients train both at once."""
    return method.trains == "both" and method.exchanges and not method.pooled


def study(runs: Sequence[Run]) -> Study:
    """Runs placed by task and arm; a second run of the same arm, task and seed is left out."""
    keys = _task_keys(runs)
    names = _task_names(runs, keys)
    varying = {key: _varying([r for r, k in zip(runs, keys) if k == key]) for key in names}
    every = sorted(set().union(*varying.values()))
    placed: dict[Hashable, Placed] = {}
    notes = []
    for run, key in zip(runs, keys):
        flat = dict(leaves(run.recipe.model_dump(mode="json")))
        one = Placed(run, names[key], {k: flat[k] for k in every if k in flat})
        kept = placed.setdefault((one.task, one.arm, one.seed), one)
        if kept is not one:
            notes.append(f"{run.path} repeats {kept.run.path} (same recipe and seed); left out")
    return Study(tuple(placed.values()), (*_data_notes(names), *notes))


def _task_keys(runs: Sequence[Run]) -> list[str]:
    """What makes scores comparable: task, data, model, and the rows there were. A run that does not
    say which rows (it has just begun) counts as one of the first that does."""
    flats = [dict(leaves(run.recipe.model_dump(mode="json"))) for run in runs]
    said = [json.dumps({k: v for k, v in f.items() if k.startswith(_TASK)}) for f in flats]
    known: dict[str, str | None] = {}
    for text, run in zip(said, runs):
        known[text] = known.get(text) or run.description
    return [json.dumps([t, run.description or known[t]]) for t, run in zip(said, runs)]


def _varying(runs: Sequence[Run]) -> set[str]:
    """The recipe's keys in which runs of one task differ, beside seed, method and bookkeeping."""
    flats = [dict(leaves(run.recipe.model_dump(mode="json"))) for run in runs]
    keys = {k for flat in flats for k in flat}
    fixed = (*_TASK, *_NO_TREATMENT, *_LOGGING, "method.")
    return {
        k
        for k in keys
        if not k.startswith(fixed) and len({json.dumps(f.get(k)) for f in flats}) > 1
    }


def _task_names(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, str]:
    """A short name for every task key; equal ones get a number."""
    names: dict[str, str] = {}
    for run, key in zip(runs, keys):
        if key not in names:
            spec = run.recipe.task
            base = spec.name or f"{run.recipe.name} ({spec.kind})"
            same = sum(n.partition(" [")[0] == base for n in names.values())
            names[key] = f"{base} [{same + 1}]" if same else base
    return names


def _data_notes(names: Mapping[str, str]) -> Iterator[str]:
    """Says so if not all runs used the same task, data, evaluation rows and model."""
    if len(names) < 2:
        return
    parts = {name: json.loads(key) for key, name in names.items()}
    told = "; ".join(f"{name}: {_told(json.loads(s), d)}" for name, (s, d) in parts.items())
    yield (
        f"These runs used {len(names)} different tasks, data sets or models, and are compared "
        f"only within each: {told}"
    )


def _told(said: Mapping[str, Any], description: str | None) -> str:
    model = said.get("model.name")
    return f"{description or 'rows not known yet'}, model {model}"


def method_label(recipe: Recipe) -> str:
    """The method with the options that tell its runs apart, e.g. `fedex-svd:8 without carry`."""
    spec = recipe.method
    label = spec.name if spec.rank is None else f"{spec.name}:{spec.rank}"
    if METHODS[spec.name].residual == "truncated":
        label += "" if spec.carry else " without carry"
        label += "" if spec.flush else " without flush"
    return label


def shown(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings for people: "r 4"."""
    for key, value in settings.items():
        if value is not None:
            yield f"{key.rpartition('.')[2]} {value}"


def _rank(placed: Placed) -> tuple:
    spec = placed.run.recipe.method
    order = list(METHODS).index(spec.name)
    values = [
        (k, v if isinstance(v, int | float) else 0, str(v)) for k, v in placed.settings.items()
    ]
    return order, spec.rank or 0, not spec.carry, not spec.flush, values


def metric_of(run: Run) -> tuple[str, bool]:
    """The metric that selects the best round, and whether a higher one is better."""
    try:
        task = recipe_task(run.recipe)
    except UserError:  # e.g. scorers that are not installed here; reading needs none
        name = run.results["metric"] if run.results else "score"
        return name, name not in ("loss", "perplexity")
    return task.primary, task.higher_is_better
