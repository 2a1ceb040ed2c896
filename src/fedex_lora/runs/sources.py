"""What a run's numbers are made of besides its recipe, as digests in sources.json: the pretrained
weights, the tokenizer, and the rows that this process has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from fedex_lora.engines.digests import rows_digest, tensors_digest, tokenizer_digest
from fedex_lora.engines.setup import Federation
from fedex_lora.errors import StorageError
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.saved import SOURCES, checked

FILE = "sources.json"


def keep_sources(directory: RunDir, federation: Federation, done: int) -> list[str]:
    """Writes sources.json; of a run that goes on, what changed as well.

    Args:
        done: How many rounds were played.

    Returns:
        Notes on what changed, as of `changed`.

    Raises:
        UserError: The pretrained weights are others.
    """
    then, now = _stored(directory), sources(federation)
    different = changed(directory, federation.recipe, now)
    known = list((then or {}).get("changes", []))
    if different:
        known.append({"after_round": done, "what": different})
    if then is None or different:
        directory.write_json(FILE, {**now, "changes": known})
    return [
        f"{what}: not as when the run began; what follows round {done} is made with what is there "
        f"now ({FILE} says so)"
        for what in different
    ]


def changed(directory: RunDir, recipe: Recipe, now: Mapping[str, Any]) -> list[str]:
    """Which rows are others than those the run began with, and whether the tokenizer is; nobody
    can repeat a run of both. Of a run without sources.json nothing is said.

    Args:
        now: As of `sources`.

    Raises:
        UserError: The pretrained weights are others.
    """
    then = _stored(directory)
    if then is None:
        return []
    _check_weights(directory, recipe, then["weights"], now["weights"])
    names = sorted({*then["rows"], *now["rows"]})
    found = [n for n in names if then["rows"].get(n) != now["rows"].get(n)]
    return found + ["the tokenizer"] * (then["tokenizer"] != now["tokenizer"])


def check_pretrained(directory: RunDir, recipe: Recipe, model: AdaptedModel) -> None:
    """Checks that a model, in which nothing is placed yet, has the weights the run began with.

    Raises:
        UserError: It has others: what was trained is added to those, so it would be a wrong one.
    """
    then = _stored(directory)
    if then is not None:
        _check_weights(directory, recipe, then["weights"], tensors_digest(model.frozen()))


def sources(federation: Federation) -> dict[str, Any]:
    """The digests of all that a federation has, in whose model nothing is placed yet."""
    parts = {
        "training": federation.clients,
        "validation": federation.validation,
        "evaluation": federation.evaluation,
    }
    return {
        "weights": tensors_digest(federation.model.frozen()),
        "tokenizer": tokenizer_digest(federation.model.tokenizer),
        "rows": {
            f"{use} rows of {name}": rows_digest(rows)
            for use, part in parts.items()
            for name, rows in part.items()
            if isinstance(rows, Dataset)  # of those of another machine only the number is known
        },
    }


def _stored(directory: RunDir) -> dict[str, Any] | None:
    value, path = directory.read_json(FILE), directory.path / FILE
    remedy = "delete the file; it is made anew of what is there"
    return None if value is None else checked(SOURCES, value, path, remedy)


def _check_weights(directory: RunDir, recipe: Recipe, then: str, now: str) -> None:
    """Quantised weights are let pass: on another device they are a bit different."""
    if then != now and recipe.model.quantisation is None:
        raise StorageError(
            f"{directory.path}: model.name: {recipe.model.name} has other pretrained weights than "
            f"when the run began (digest {then[:12]} then, {now[:12]} now), and what was trained "
            "belongs to those. Put them back (the same revision), or begin a new run"
        )
