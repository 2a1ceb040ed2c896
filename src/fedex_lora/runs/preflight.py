"""What is wrong with a recipe and shows before a model is loaded: all of it at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.fits import rank_problems
from fedex_lora.engines.setup import (
    architecture_of,
    federation_settings,
    load_rows,
    recipe_task,
)
from fedex_lora.engines.training import training_problems
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.model.architectures import narrowest, read_config
from fedex_lora.recipe import Problem, Recipe, limits
from fedex_lora.recipe.reader import whole

_KEY = re.compile(r"[a-z_]+(\.[A-Za-z_]+)+")


def check(recipe: Recipe) -> None:
    """Checks values, ranks and the Trainer's settings; the rows as well if anything is wrong.

    Rows take long to read, and are read and checked anyway before the model is loaded.

    Raises:
        UserError: One line for each problem.
    """
    found = [*limits(recipe), *training_problems(recipe.training)]
    wrong = {key for key, _ in found}
    raw = recipe.model_dump(exclude_unset=True)
    rest = whole(raw, (tuple(key.split(".")) for key in wrong))[0] if wrong else recipe
    found += [problem for problem in (_ranks(rest) if rest else ()) if problem[0] not in wrong]
    if found:
        found += [problem for problem in (_rows(rest) if rest else ()) if problem[0] not in wrong]
        raise RecipeError("\n".join(": ".join(filter(None, problem)) for problem in found))


def beforehand(recipe: Recipe) -> Iterator[Problem]:
    """What does not show in the recipe alone: ranks that no layer has, rows that do not suffice."""
    yield from _ranks(recipe)
    yield from _rows(recipe)


def _ranks(recipe: Recipe) -> Iterator[Problem]:
    """Ranks above the sides of all layers that have them.

    The layers are only worked out where a rank is above a side that the model's config names.
    """
    lora = recipe.lora
    if METHODS[recipe.method.name].trains == "all":
        return
    try:
        task = recipe_task(recipe)
        config = read_config(recipe.model.name, recipe.model.revision, **task.model_kwargs())
        if max(lora.r, *(lora.ranks or []), *lora.rank_pattern.values(), 0) <= narrowest(config):
            return
        model = architecture_of(recipe, task)
    except UserError:  # not known here, or loading the model will tell what is wrong
        return
    clients = [str(i) for i, _ in enumerate(lora.ranks or [])]
    yield from rank_problems(lora, federation_settings(recipe, model, clients).layers)


def _rows(recipe: Recipe) -> Iterator[Problem]:
    """Whether the rows that are here are there, fit the task and suffice for the clients."""
    if elsewhere(recipe):
        return
    try:
        load_rows(recipe, recipe_task(recipe))
    except UserError as error:
        key, _, text = str(error).partition(": ")
        yield (key, text) if _KEY.fullmatch(key) else ("", str(error))


def elsewhere(recipe: Recipe) -> str:
    """Why rows cannot be read without a network; "" if they can."""
    further = [name for name in recipe.data.evaluation.values() if not Path(name).exists()]
    for name in (recipe.data.name, *further):
        if name is not None:
            return f"unknown without the rows: {name} is on the hub; local copies: data.path"
    return "" if recipe.engine.kind != "flower" else "unknown: the rows are the clients' own"
