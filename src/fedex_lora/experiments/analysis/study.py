"""Runs side by side: which tasks they are of, and which arms of an experiment they are.

Runs belong to one task if they have the same task, data and model. Within a task, runs that
differ in their seed alone are one arm, named after the method and whatever else varies.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedex_lora.aggregation.methods import METHODS, Method
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.recipe import Recipe

Settings = Mapping[str, Any]  # dotted keys of the recipe

_TASK = ("task.", "data.", "model.name", "model.revision")  # makes scores incomparable
_NO_TREATMENT = ("name", "seed", "engine.", "records.", "evaluation.", "model.device")
_LOGGING = ("training.report_to", "training.logging", "training.run_name")
# settings that people change along with another; named only where they vary by themselves
_FOLLOWS = {
    "lora.lora_alpha": "lora.r",
    "federation.rounds": "training.num_train_epochs",
}


@dataclass(frozen=True)
class Placed:
    """A run and its place among the others.

    Attributes:
        task: Name of the task and data, the same for all runs whose scores may be compared.
        label: The method with its options, e.g. "fedex-svd:8 without carry".
        settings: The recipe's keys that vary among runs of a task, beside the method's, and beside
            training settings that every method has one value of (tuned for it).
        named: Those that are part of the arm's name.
        condition: Those that vary within methods, so that methods are compared at equal ones.
    """

    run: Run
    task: str
    label: str
    settings: Settings
    named: Settings
    condition: Settings

    @property
    def seed(self) -> int:
        return self.run.recipe.seed

    @property
    def method(self) -> Method:
        return METHODS[self.run.recipe.method.name]

    @property
    def arm(self) -> str:
        """The method and what else varies, e.g. "fedex, r 4"."""
        return ", ".join([self.label, *shown(self.named)])

    def others(self, *but: str) -> str:
        """The settings except those that begin with `but`: what must be equal in a pair."""
        return as_text({k: v for k, v in self.settings.items() if not k.startswith(tuple(but))})


@dataclass(frozen=True)
class Study:
    """All runs, placed.

    Attributes:
        notes: What people should know before they compare: other data, runs given twice.
        condition: Of a facet, what its runs have in common: "r 4".
    """

    placed: tuple[Placed, ...]
    notes: tuple[str, ...] = ()
    condition: str = ""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(p.task for p in self.placed))

    @property
    def arms(self) -> list[str]:
        """In the order of the methods' table, then of the settings."""
        return list(dict.fromkeys(p.arm for p in sorted(self.placed, key=_rank)))

    def of_arms(self, task: str) -> list[str]:
        """The arms that have runs of a task, in order."""
        there = {p.arm for p in self.of(task)}
        return [arm for arm in self.arms if arm in there]

    @property
    def methods(self) -> list[str]:
        """Labels of methods with their options, in the order of the methods' table."""
        return list(dict.fromkeys(p.label for p in sorted(self.placed, key=_rank)))

    @property
    def reference(self) -> str:
        """The method that others are compared with: exact averaging if there, else the first."""
        exact = {p.label for p in self.placed if is_exact_average(p.method)}
        return next((m for m in self.methods if m in exact), self.methods[0])

    @property
    def by_arm(self) -> bool:
        """Whether arms are compared with one arm, and not methods with a method at equal settings:
        there is one method, or others than the reference ran at several settings."""
        several = len({as_text(p.condition) for p in self.placed}) > 1
        return len(self.methods) == 1 or (several and len(self._reference_arms) == 1)

    @property
    def first(self) -> str:
        """What others are compared with: an arm, or the reference method."""
        return self._reference_arms[0] if self.by_arm else self.reference

    def in_short(self, name: str) -> str:
        """An arm's name in a sentence: its method's, if that has no other arm."""
        labels = {p.arm: p.label for p in self.placed}
        label = labels.get(name, name)
        return label if [*labels.values()].count(label) == 1 else name

    @property
    def _reference_arms(self) -> list[str]:
        of_reference = {p.arm for p in self.placed if p.label == self.reference}
        return [arm for arm in self.arms if arm in of_reference]

    def of(self, task: str | None = None, arm: str | None = None) -> list[Placed]:
        """The runs of one task, of one arm, or both, by seed."""
        found = [p for p in self.placed if task in (None, p.task) and arm in (None, p.arm)]
        return sorted(found, key=lambda p: p.seed)

    def main_arm(self, task: str) -> str:
        """The first arm of the reference method in a task; without one, the first arm there."""
        runs = sorted(self.of(task), key=_rank)
        return next((p.arm for p in runs if p.label == self.reference), runs[0].arm)

    def facets(self, task: str) -> dict[str, Study]:
        """The runs of a task by condition, named: what may be drawn in one figure each."""
        found: dict[str, list[Placed]] = {}
        for p in sorted(self.of(task), key=_rank):
            found.setdefault(", ".join(shown(p.condition)), []).append(p)
        return {name: Study(tuple(placed), (), name) for name, placed in found.items()}


def _rank(placed: Placed) -> tuple:
    spec = placed.run.recipe.method
    order = list(METHODS).index(spec.name)
    values = [(k, v if isinstance(v, int | float) else 0, str(v)) for k, v in placed.named.items()]
    return order, spec.rank or 0, not spec.carry, not spec.flush, placed.label, values


def is_exact_average(method: Method) -> bool:
    """Whether clients get the mean factors and the whole residual goes into the base."""
    return method.averages and method.residual == "exact" and not method.pooled


def deviates(method: Method) -> bool:
    """Whether averaging its factors would miss anything: several clients train both at once."""
    return method.trains == "both" and method.exchanges and not method.pooled


def study(runs: Sequence[Run]) -> Study:
    """Runs placed by task and arm; a second run of the same arm, task and seed is left out."""
    tasks, note = _tasks(runs)
    every = sorted(
        {k for t in set(tasks) for k in _varying([r for r, u in zip(runs, tasks) if u == t])}
    )
    tuned, follow = _tuned(runs, every), _following(runs)
    placed: dict[Hashable, Placed] = {}
    notes = [note] if note else []
    for run, task in zip(runs, tasks):
        varying = {k: run.settings[k] for k in every if k in run.settings}
        named = {k: v for k, v in varying.items() if k not in follow}
        one = Placed(
            run,
            task,
            method_label(run.recipe),
            {k: v for k, v in varying.items() if not (k in tuned and k.startswith("training."))},
            named,
            {k: v for k, v in named.items() if k not in tuned},
        )
        kept = placed.setdefault((one.task, one.arm, one.seed), one)
        if kept is not one:
            notes.append(f"{run.path} repeats {kept.run.path} (same recipe and seed); left out")
    return Study(tuple(placed.values()), tuple(notes))


def _tasks(runs: Sequence[Run]) -> tuple[list[str], str]:
    """The name of each run's task, and a note where not all are of one.

    One task has the same task, data and model, and the rows there were. A run that does not say
    which rows (it has just begun) counts as one of the first that does.
    """
    said = [as_text({k: v for k, v in r.settings.items() if k.startswith(_TASK)}) for r in runs]
    rows: dict[str, str | None] = {}
    for text, run in zip(said, runs):
        rows[text] = rows.get(text) or run.description
    keys = [(text, run.description or rows[text]) for text, run in zip(said, runs)]
    names: dict[tuple[str, str | None], str] = {}
    told = []
    for run, key in zip(runs, keys):
        if key not in names:
            base = (
                getattr(run.recipe.task, "name", None)
                or f"{run.recipe.name} ({run.recipe.task.kind})"
            )
            same = sum(n.partition(" [")[0] == base for n in names.values())
            names[key] = f"{base} [{same + 1}]" if same else base
            model = run.recipe.model.name
            told.append(f"{names[key]}: {key[1] or 'rows not known yet'}, model {model}")
    note = (
        f"These runs used {len(names)} different tasks, data sets or models, and are compared "
        f"only within each: {'; '.join(told)}"
    )
    return [names[key] for key in keys], note if len(names) > 1 else ""


def _varying(runs: Sequence[Run]) -> set[str]:
    """The recipe's keys in which runs of one task differ, beside seed, method and bookkeeping."""
    fixed = (*_TASK, *_NO_TREATMENT, *_LOGGING, "method.")
    keys = {k for run in runs for k in run.settings if not k.startswith(fixed)}
    return {k for k in keys if len({as_text(run.settings.get(k)) for run in runs}) > 1}


def _tuned(runs: Sequence[Run], keys: Sequence[str]) -> set[str]:
    """Keys of which every method has one value; not so if there is one method."""
    labels = [method_label(run.recipe) for run in runs]
    methods = len(set(labels))
    pairs = {
        k: {(label, as_text(run.settings.get(k))) for label, run in zip(labels, runs)} for k in keys
    }
    return {k for k, found in pairs.items() if len(found) == methods > 1}


def _following(runs: Sequence[Run]) -> set[str]:
    """Of the settings that people change along with another, those that are a function of it."""
    found = set()
    for key, leader in _FOLLOWS.items():
        pairs = {tuple(as_text(run.settings.get(k)) for k in (leader, key)) for run in runs}
        if len(pairs) == len({lead for lead, _ in pairs}) > 1:
            found.add(key)
    return found


def as_text(value: Any) -> str:
    """Equal for equal values."""
    return json.dumps(value, sort_keys=True)


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


def metric_of(run: Run) -> tuple[str, bool]:
    """The metric that selects the best round, and whether a higher one is better."""
    try:
        task = recipe_task(run.recipe)
    except UserError:  # e.g. scorers that are not installed here; reading needs none
        name = run.results["metric"] if run.results else "score"
        return name, name not in ("loss", "perplexity")
    return task.primary, task.higher_is_better
