"""A grid file: recipes × choices × methods × seeds, for one table or figure.

recipes: [cola.yaml]            # beside this file
methods:
  - centralized
  - fedex-svd:8                 # a truncated residual's rank follows a colon
  - {name: ffa, label: ffa-2r, rank_factor: 2}
seeds: [0, 1, 2]
set: {federation.rounds: 15}    # for all runs
vary:                           # every combination is run
  lora.r: [1, 4]                # a key of the recipe, and its values
  epochs:                       # or a name of your own, and what each choice sets
    short: {training.num_train_epochs: 3, federation.rounds: 50}
    long: {training.num_train_epochs: 10, federation.rounds: 15}
columns: lora.r                 # goes across the table; without it the metrics do
choose: [lora.r]                # the first seed tells, on the rows that select rounds, which of
                                # these choices the other seeds run
choose_at: {epochs: short}      # only there; the other choices on this axis run what was best there
train_once: true                # methods take over each other's first round of training
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedex_lora.aggregation.methods import METHODS, get_method
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.recipe import Part, Problem, Recipe, did_you_mean
from fedex_lora.recipe.draft import Keys, Places
from fedex_lora.recipe.reader import read_yaml

Overrides = Mapping[str, Any]  # by dotted key of the recipe

RECIPES = "recipe"  # the axis of the recipes, among those of `vary`
_SETTLED = {"seed": "seeds", "method": "methods", "method.name": "methods"}


class MethodEntry(Part):
    """One row of the table."""

    name: str  # as `compare --methods` has it
    label: str | None = None  # its name in the table and in directories; else `name`
    set: dict[str, Any] = Field(default={})
    rank_factor: int = Field(default=1, ge=1)  # times lora.r; 2 makes up for a frozen factor

    @property
    def shown(self) -> str:
        return self.label or self.name

    def problems(self) -> Iterator[Problem]:
        name, colon, rank = self.name.partition(":")
        try:
            truncated = get_method(name).residual == "truncated"
        except UserError as error:
            yield "name", str(error).removeprefix("method.name: ")
            return
        if truncated and not rank.isdecimal():
            yield "name", f"{name} needs the rank to truncate to, e.g. {name}:8"
        if colon and not truncated:
            having = ", ".join(k for k, m in METHODS.items() if m.residual == "truncated")
            yield "name", f"only a truncated residual has a rank: {having}"
        yield from _settled("set", self.set)

    def overrides(self) -> dict[str, Any]:
        """What this row sets in the recipe, the factor of the rank aside."""
        name, _, rank = self.name.partition(":")
        method = {"name": name, "rank": int(rank)} if rank else {"name": name}
        return {"method": method, **self.set}


class Grid(Part):
    """What a grid file says. `vary` maps a key to its values, or a name to named choices."""

    recipes: list[str] = Field(min_length=1)
    methods: list[MethodEntry] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    set: dict[str, Any] = Field(default={})
    vary: dict[str, Any] = Field(default={})
    columns: str | None = None
    choose: list[str] = Field(default=[])  # axes whose best choice at the first seed is kept
    choose_at: dict[str, Any] = Field(default={})  # the choice on other axes where that is told
    train_once: bool = False  # methods take over each other's first round: the same bits

    def axes(self) -> dict[str, dict[str, Overrides]]:
        """Of each name in `vary`: what every choice is called, and what it sets."""
        return {name: _choices(name, given) for name, given in self.vary.items()}

    def judging(self) -> dict[str, str]:
        """`choose_at` by the labels of the choices."""
        return {
            name: value if isinstance(self.vary[name], dict) else _label(name, value)
            for name, value in self.choose_at.items()
        }

    def problems(self) -> Iterator[Problem]:
        yield from _settled("set", self.set)
        for name, given in self.vary.items():
            yield from _vary_problems(name, given)
        yield from self._set_twice()
        yield from _twice("methods", [entry.shown for entry in self.methods])
        yield from _twice("seeds", self.seeds)
        yield from _twice("recipes", [Path(file).stem for file in self.recipes])
        if any(seed < 0 for seed in self.seeds):
            yield "seeds", "expected whole numbers of at least 0"
        known = [RECIPES, *self.vary]
        axes = {
            "columns": [self.columns] if self.columns else [],
            "choose": self.choose,
            "choose_at": list(self.choose_at),
        }
        for key, named in axes.items():
            for name in named:
                if name not in known:
                    text = f"expected one of {', '.join(known)}"
                    yield key, text + did_you_mean(name, known)
        if RECIPES in self.choose:
            yield "choose", "recipes differ in their data; choose among names in `vary`"
        if self.choose_at and not self.choose:
            yield "choose_at", "there is nothing to choose; give `choose` too, or leave it out"
        for name, value in self.choose_at.items():
            given = self.vary.get(name, [])
            if name in self.choose or name == RECIPES:
                yield f"choose_at.{name}", "not an axis of its own; name another one of `vary`"
            elif isinstance(given, list | dict) and value not in list(given):
                yield f"choose_at.{name}", f"expected one of {', '.join(map(str, given))}"

    def _set_twice(self) -> Iterator[Problem]:
        """Keys that are varied and set besides: names would say what is not so."""
        varied = [key for name, given in self.vary.items() for key in _keys_of(name, given)]
        for key in sorted({key for key in varied if varied.count(key) > 1}):
            yield "vary", f"{key} is set by two of its names; leave it out of one"
        rows = {f"methods.{i}.set": entry.set for i, entry in enumerate(self.methods)}
        for where, given in {"set": self.set, **rows}.items():
            for key in sorted(given.keys() & set(varied)):
                yield f"{where}.{key}", "`vary` sets it too; leave it out of one of them"


def _keys_of(name: str, given: Any) -> dict[str, None]:
    """The keys that one name in `vary` sets."""
    if not isinstance(given, dict):
        return {name: None}
    return dict.fromkeys(k for chosen in given.values() if isinstance(chosen, dict) for k in chosen)


def _choices(name: str, given: Any) -> dict[str, Overrides]:
    if isinstance(given, dict):
        return given
    return {_label(name, value): {name: value} for value in given}


def _label(name: str, value: Any) -> str:
    return f"{name.rpartition('.')[2]}={plain_text(value)}"


def plain_text(value: Any) -> str:
    """A value as part of a name.

    Example:
        >>> plain_text(0.5), plain_text("a/b"), plain_text(["q", "v"])
        ('0.5', 'a-b', 'q-v')
    """
    text = value if isinstance(value, str) else json.dumps(value)
    kept = "".join(c if c.isalnum() or c in "._=+-" else "-" for c in text)
    return "-".join(filter(None, kept.split("-")))


def _vary_problems(name: str, given: Any) -> Iterator[Problem]:
    where = f"vary.{name}"
    if isinstance(given, list):
        yield from _settled("vary", {name: given})
        yield from _twice(where, [plain_text(value) for value in given])
    elif isinstance(given, dict):
        for label, overrides in given.items():
            if not isinstance(overrides, dict):
                yield f"{where}.{label}", "expected what it sets, e.g. {lora.r: 4}"
                continue
            if plain_text(label) != label:
                yield f"{where}.{label}", "a name of letters, digits and . _ = + - is needed"
            yield from _settled(f"{where}.{label}", overrides)
    if not isinstance(given, list | dict) or not given:
        yield where, "expected a list of values, or choices by name"


def _settled(where: str, overrides: Overrides) -> Iterator[Problem]:
    for key in overrides:
        if key in _SETTLED:
            yield f"{where}.{key}", f"set by the grid's `{_SETTLED[key]}`"


def _twice(where: str, names: Sequence[object]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield where, f"{name} is there twice; leave one out or give it another label"


def is_grid(path: Path) -> bool:
    """Whether a YAML file is a grid and no recipe: it has `recipes`, which no recipe has.

    Raises:
        UserError: It is unreadable, or no YAML.
    """
    return "recipes" in read_yaml(path)[0]


def load_grid(path: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        UserError: If anything is wrong; one line for each problem, with its place.
    """
    raw, places, lines = read_yaml(path)
    if "recipes" not in raw and "model" in raw:
        raise RecipeError(f"{path}: this is a recipe, not a grid; start it with `fedex-lora run`")
    return grid_of(raw, places, lines)


def grid_of(raw: dict[str, Any], places: Places, lines: Sequence[str] = ()) -> Grid:
    """The grid of plain values.

    Args:
        raw: As in YAML; methods that are names become entries.
        places: Where the values were written.
        lines: Problems that are known already.

    Raises:
        UserError: As `load_grid`.
    """
    lines = list(lines)
    methods = raw.get("methods")
    if isinstance(methods, list):
        raw["methods"] = [{"name": m} if isinstance(m, str) else m for m in methods]
    grid = None
    try:
        grid = Grid.model_validate(raw)
    except ValidationError as error:
        lines += [places.line(*problem) for problem in _describe(error, places)]
    if lines or grid is None:
        raise RecipeError("\n".join(dict.fromkeys(lines)))
    return grid


def grid_row(grid: Grid) -> list[str]:
    """A grid in a line: how many runs, with which methods, over what."""
    over = {RECIPES: len(grid.recipes), **{name: len(c) for name, c in grid.axes().items()}}
    runs = math.prod(over.values()) * len(grid.methods) * len(grid.seeds)
    varies = ", ".join(f"{name} ({n})" for name, n in over.items() if n > 1)
    return [str(runs), ", ".join(entry.shown for entry in grid.methods), varies]


def _describe(error: ValidationError, places: Places) -> Iterator[tuple[Keys, str]]:
    for detail in error.errors(include_url=False):
        keys = detail["loc"]
        if detail["type"] == "fields":
            for path, what in detail.get("ctx", {})["found"]:
                yield _keys((*keys, path), places), what
        elif detail["type"] == "extra_forbidden":
            known = Grid.model_fields if len(keys) == 1 else MethodEntry.model_fields
            key = str(keys[-1])
            home = "; keys of the recipe go under `set`" if _of_recipe(key) else ""
            near = did_you_mean(key, known) or f"; known: {', '.join(known)}"
            yield keys, "unknown key" + (home or near)
        else:
            text = detail["msg"].replace("Input should be", "expected")
            got = json.dumps(detail["input"], default=str)[:80]
            shown = "" if detail["type"] == "missing" else f", got {got}"
            yield keys, text[0].lower() + text[1:] + shown


def _keys(given: Keys, places: Places) -> Keys:
    """The keys as they were written: below `set` and `vary` a dotted name is one of them."""
    path = ".".join(map(str, given))
    written = [k for k in places.known if k and f"{path}.".startswith(_joined(k) + ".")]
    nearest = max(written, key=lambda k: len(_joined(k)), default=())
    rest = path[len(_joined(nearest)) :].removeprefix(".")
    return (*nearest, rest) if rest else nearest


def _joined(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _of_recipe(key: str) -> bool:
    return key.partition(".")[0] in Recipe.model_fields
