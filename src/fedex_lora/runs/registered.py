"""What comes from outside this package: a run says where it was registered."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.registry import Registry
from fedex_lora.errors import RecipeError
from fedex_lora.recipe import Recipe, task_kinds
from fedex_lora.recipe.extensions import OURS, TRAIN_FUNCTIONS, TRANSPORTS
from fedex_lora.recipe.reader import load_stored_recipe, read_yaml


def registered(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Where what a recipe names comes from, if from outside; part of environment.json."""
    task = type(recipe.task).__module__
    found = {
        "method": METHODS.added_by(recipe.method.name),
        "task": None if task.startswith("fedex_lora.") else task,
        "transport": _by(TRANSPORTS, recipe.engine.kind),
        "train function": _by(TRAIN_FUNCTIONS, recipe.engine.train),
    }
    main = getattr(sys.modules["__main__"], "__file__", None)
    script = f"the script {Path(main).absolute()}" if main else "an interactive session"
    told = {
        block: script if by == "__main__" or by.startswith("fedex_lora.") else by
        for block, by in found.items()
        if by is not None
    }
    return {"registered": told} if told else {}


def _by(rows: Registry[Any], name: str | None) -> str | None:
    return rows.added_by(name) if name is not None and name in rows else None


def stored_recipe(file: Path, environment: Any) -> Recipe:
    """The recipe of a run that was begun.

    Args:
        file: Its recipe.yaml.
        environment: What its environment.json says.

    Raises:
        UserError: It is none; or its method or task is one that nothing registers here.
    """
    try:
        return load_stored_recipe(file)
    except RecipeError:
        raw = read_yaml(file)[0]
        where = environment.get("registered", {}) if isinstance(environment, Mapping) else {}
        for what, block, key, known in (
            ("method", "method", "name", METHODS),
            ("task", "task", "kind", task_kinds()),
            ("transport", "engine", "kind", [*OURS, *TRANSPORTS]),
            ("train function", "engine", "train", TRAIN_FUNCTIONS),
        ):
            part = raw.get(block)
            name = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(name, str) and name not in known:
                by = f" It was registered by {where[what]}." if what in where else ""
                raise RecipeError(
                    f"{file}: {block}.{key}: {name!r} is a {what} that neither fedex-lora nor an "
                    f"installed package has.{by} What a script registers is known while that "
                    "script runs: install a package that names it as an entry point of "
                    f"fedex_lora.{what.replace(' ', '_')}s, or call from a script that registers "
                    "it first"
                ) from None
        raise
