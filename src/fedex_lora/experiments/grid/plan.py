"""The runs of a grid: their recipes, checked before any starts, and what is done of them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, Literal

from fedex_lora.engines.setup import recipe_task
from fedex_lora.engines.training import training_problems
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.experiments.alike import in_common, settled
from fedex_lora.experiments.grid.spec import RECIPES, Grid, MethodEntry, load_grid, plain_text
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import differences, load_recipe, read_draft
from fedex_lora.runs.rundir import RunDir

Standing = Literal["new", "begun", "done", "other"]


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        choice: What was chosen on each axis, by the axis' name; the recipe's file name first.
        label: The row of the table it belongs to.
        file: The recipe's file.
        sets: What is set in it, as `fedex-lora run --set` takes it, the seed aside.
        recipe: The recipe with all that set.
    """

    choice: Mapping[str, str]
    label: str
    seed: int
    file: Path
    sets: tuple[str, ...]
    recipe: Recipe

    @property
    def cell(self) -> str:
        """The directory of the runs that differ in method and seed only."""
        return "-".join(self.choice.values())

    @property
    def name(self) -> str:
        """The run's directory within the grid's."""
        return f"{self.cell}/{plain_text(self.label)}-seed{self.seed}"

    def command(self, out: Path, resume: bool, first_rounds: Path | None = None) -> list[str]:
        """What runs it in a process of its own."""
        sets = [x for text in (*self.sets, f"seed={self.seed}") for x in ("--set", text)]
        start = [sys.executable, "-m", "fedex_lora", "run", str(self.file)]
        shared = ["--first-rounds", str(first_rounds)] if first_rounds else []
        more = [*shared, *(["--resume"] if resume else [])]
        return [*start, *sets, "--out", str(out / self.name), *more]


@dataclass(frozen=True)
class Plan:
    """A grid file and its runs.

    Attributes:
        runs: Those that are asked for.
        every: All that the file speaks of.
    """

    grid: Grid
    runs: tuple[Run, ...]
    every: tuple[Run, ...]


def plan(path: Path, sets: Sequence[str] = (), data: Path | None = None, only: str = "*") -> Plan:
    """All runs of a grid file, in its order, every recipe checked.

    Args:
        sets: Overrides `a.b=c` for every run, over what the file sets.
        data: Where local copies of the data lie, each in the directory of the task's name
            (`sst2`), of the hub's data set (`e2e_nlg`), or of the recipe's own `data.path`.
        only: A pattern of run names, e.g. `cola-*/fedex-seed0`.

    Raises:
        UserError: Anything wrong with the file, a recipe of it, or how they go together.
    """
    grid = load_grid(path)
    lists = {name for name, given in grid.vary.items() if isinstance(given, list)}
    for text in sets:
        key = text.partition("=")[0].strip()
        if key in ("seed", "method", "method.name", *lists):
            raise RecipeError(f"`set={text}`: {path} has its own list of them; change it there")
    runs = [
        replace(run, seed=seed, recipe=run.recipe.model_copy(update={"seed": seed}))
        for run in _first_seeds(grid, path, sets, data)
        for seed in grid.seeds
    ]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise RecipeError(f"{path}: two runs would be called {name}; choose other labels")
    found = tuple(run for run in runs if fnmatch(run.name, only))
    if not found:
        raise RecipeError(f"`only`: {only!r} fits none of {len(runs)} runs, e.g. {runs[0].name}")
    return Plan(grid, found, tuple(runs))


def _first_seeds(grid: Grid, path: Path, sets: Sequence[str], data: Path | None) -> Iterator[Run]:
    """Every combination with the first seed only, whose recipe stands for the others."""
    axes = grid.axes()
    choices = product(*(by_label.items() for by_label in axes.values()))
    for file, picked in product(grid.recipes, list(choices)):
        choice = {RECIPES: plain_text(Path(file).stem)}
        choice |= {axis: label for axis, (label, _) in zip(axes, picked)}
        varied: dict[str, Any] = {k: v for _, chosen in picked for k, v in chosen.items()}
        found = []
        for entry in grid.methods:
            given = {**grid.set, **varied, **entry.overrides()}
            texts = [*(override(k, v) for k, v in given.items()), *sets]
            run = (choice, entry.shown, grid.seeds[0], path.parent / file)
            try:
                found.append(Run(*run, *_resolve(path.parent / file, texts, entry, data)))
            except UserError as error:
                what = f"{'-'.join(choice.values())}, {entry.shown}"
                raise RecipeError(f"{path}: {what}:\n{error}") from None
        engine = in_common([run.recipe for run in found])
        yield from (_with_engine(run, settled(run.recipe, engine)) for run in found)


def _with_engine(run: Run, values: Mapping[str, Any]) -> Run:
    """The same, its block `engine` naming these values."""
    sets = [override(f"engine.{key}", value) for key, value in values.items()]
    return replace(run, sets=(*run.sets, *sets), recipe=run.recipe.with_engine(**values))


def _resolve(
    file: Path, sets: list[str], entry: MethodEntry, data: Path | None
) -> tuple[tuple[str, ...], Recipe]:
    """The overrides with those that depend on the recipe, and the recipe with all of them."""
    recipe = read_draft(file, sets).checked(lambda r: training_problems(r.training)).settled()
    more = []
    if entry.rank_factor > 1:
        if recipe.lora.rank_pattern or recipe.lora.ranks:
            raise RecipeError("rank_factor: only goes with lora.r, not with rank_pattern or ranks")
        more.append(override("lora.r", entry.rank_factor * recipe.lora.r))
    if data is not None:
        more += _local(recipe, data)
    sets = [*sets, *more]
    return tuple(sets), load_recipe(file, sets) if more else recipe


def _local(recipe: Recipe, data: Path) -> list[str]:
    """Sets the local copy in place of a hub's data set or of another directory.

    Evaluation splits that have a file of their name there are taken from it.
    """
    spec = recipe.data
    if spec.path is None and spec.name is None:
        return []
    hub = (spec.name or "").rpartition("/")[2]
    folder = data / (spec.path.name if spec.path else getattr(recipe.task, "name", None) or hub)
    if not folder.is_dir():
        raise RecipeError(
            f"`data`: there is no directory {folder}; expected train.jsonl, ... in it"
        )
    there = {file.stem for file in folder.iterdir()}
    elsewhere = {k: v for k, v in spec.evaluation.items() if k not in there}
    sets = [override("data.path", str(folder))]
    return sets + ([override("data.evaluation", elsewhere)] if spec.evaluation else [])


def override(key: str, value: Any) -> str:
    """The text that sets a key to a value, for `--set`.

    Example:
        >>> override("lora.r", 4), override("method", {"name": "fedex"})
        ('lora.r=4', 'method={"name": "fedex"}')
    """
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def standing(run: Run, out: Path) -> Standing:
    """How far a run is: "other" if its directory holds a run with another recipe."""
    directory = RunDir(out / run.name)
    if not directory.is_run():
        return "new"
    if differences(run.recipe, directory.recipe()):
        return "other"
    return "begun" if directory.results() is None else "done"


def left(runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs that are not done.

    Raises:
        UserError: A directory holds a run with another recipe; the differences are named.
    """
    now = {run.name: standing(run, out) for run in runs}
    for run in runs:
        if now[run.name] == "other":
            path = out / run.name
            different = "; ".join(differences(run.recipe, RunDir(path).recipe()))
            raise RecipeError(
                f"{path}: holds a run with another recipe: {different}. Use another `out`"
            )
    return [run for run in runs if now[run.name] != "done"]


def due(plan: Plan, out: Path) -> list[Run]:
    """The runs that are to be made, as far as finished ones tell.

    Without `choose` all. With it those that judge, of the first seed and, with `choose_at`, of that
    choice alone; of the others those whose choice was the best there (of equal ones the first),
    once all that compete with it are finished.
    """
    grid, there = plan.grid, plan.grid.judging()
    if not grid.choose:
        return [*plan.runs]

    def judges(run: Run) -> bool:
        at = all(run.choice[axis] == label for axis, label in there.items())
        return at and run.seed == grid.seeds[0]

    def arm(run: Run) -> tuple[str, ...]:
        fixed = (v for axis, v in run.choice.items() if axis not in (*grid.choose, *there))
        return run.label, *fixed

    def chosen(run: Run) -> tuple[str, ...]:
        return tuple(run.choice[axis] for axis in grid.choose)

    rivals: dict[tuple[str, ...], list[Run]] = {}
    for run in filter(judges, plan.every):
        rivals.setdefault(arm(run), []).append(run)
    best = dict[tuple[str, ...], tuple[str, ...]]()
    for key, runs in rivals.items():
        results = [RunDir(out / run.name).results() for run in runs]
        sign = 1 if recipe_task(runs[0].recipe).higher_is_better else -1
        scores = [sign * r["best"]["score"] for r in results if r is not None]
        if len(scores) == len(runs):
            best[key] = chosen(runs[scores.index(max(scores))])
    return [run for run in plan.runs if judges(run) or best.get(arm(run)) == chosen(run)]


def told(run: Run, out: Path) -> str:
    """How far a run is, for people: `done`, `3 of 50`, `-`."""
    now = standing(run, out)
    if now == "begun":
        lines = len(RunDir(out / run.name).records())
        return f"{lines} of {run.recipe.federation.rounds}"
    return {"new": "-", "other": "other recipe"}.get(now, now)
