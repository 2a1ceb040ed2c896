"""The rows of all parties of a federation, before encoding: dealt out, or one file each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from fedex_lora.data.load import load, load_client, load_validation
from fedex_lora.data.partition import partition, split_validation
from fedex_lora.data.places import no_split
from fedex_lora.errors import RecipeError, UserError, Withheld
from fedex_lora.recipe import Recipe
from fedex_lora.tasks import Task

_phase = logging.getLogger("fedex_lora.phase")  # what takes long, for who wants to know


@dataclass(frozen=True)
class Rows:
    """The rows of all parties before encoding."""

    train: Mapping[str, Dataset]
    validation: Mapping[str, Dataset]
    evaluation: Mapping[str, Dataset]
    description: str
    files: tuple[Path, ...] = ()  # that the recipe does not name


def load_rows(recipe: Recipe, task: Task) -> Rows:
    """Rows by client, dealt out or one file each, and the evaluation splits."""
    _phase.info("reading rows")
    data = load(recipe.data, task, recipe.seed)
    fed = recipe.federation
    train = data.clients
    if train is None:
        assert data.train is not None
        train = partition(data.train, fed.partition, fed.clients, recipe.seed, task)
    train, validation = _split(recipe, train, data.validation)
    evaluation = data.evaluation if recipe.evaluation.where != "clients" else {}
    if not evaluation and recipe.evaluation.where != "clients":
        told = no_split(recipe.data.path, task.evaluation_splits)
        raise RecipeError(f"evaluation.where: {recipe.evaluation.where}, but {told}")
    return Rows(train, validation, evaluation, data.description)


def _split(
    recipe: Recipe, rows: Mapping[str, Dataset], own: Mapping[str, Dataset]
) -> tuple[Mapping[str, Dataset], Mapping[str, Dataset]]:
    """Training rows and validation rows, by client; the latter only if clients evaluate.

    Args:
        own: Validation rows of clients that have some apart from their training rows.
    """
    if recipe.evaluation.where == "server":
        return rows, {}
    fraction = recipe.evaluation.client_fraction
    split = {
        n: (r, own[n]) if n in own else split_validation(r, fraction, recipe.seed, n)
        for n, r in rows.items()
    }
    return {n: t for n, (t, _) in split.items()}, {n: v for n, (_, v) in split.items()}


def client_rows(recipe: Recipe, task: Task, name: str, file: Path | None = None) -> Rows:
    """One client's own training and validation rows, as in a run on one machine.

    Raises:
        Withheld: They cannot be used.
    """
    try:
        if file is not None:
            mine = {name: load_client(recipe.data, task, recipe.seed, name, file)}
            held = [n for n in mine if n in recipe.data.validation]
            own = {n: load_validation(recipe.data, task, recipe.seed, n) for n in held}
            train, validation = _split(recipe, mine, own)
            return Rows(train, validation, {}, "", (file,))
        whole = load_rows(recipe, task)
    except UserError as error:
        raise Withheld(str(error)) from error
    if name not in whole.train:
        raise RecipeError(f"{name!r} has no share of the data: {', '.join(whole.train)} have")
    train, validation = (
        {n: r for n, r in part.items() if n == name} for part in (whole.train, whole.validation)
    )
    return Rows(train, validation, {}, "")
