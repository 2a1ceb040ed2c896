"""More rounds for a run that is finished, and that its records say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedex_lora.disk import write_atomic
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.rundir import EXTENDED, RunDir


def extend(directory: RunDir, rounds: int) -> int:
    """Makes a finished run one that has so many rounds left; `resume_run` plays them.

    `extended.json` keeps from how many rounds to how many, once for every time. What the run came
    to before, `results.json` and `final`, is set aside in the run's directory.

    Returns:
        How many rounds it has now.

    Raises:
        UserError: The run is not finished, was stopped by its patience, or has a privacy budget.
    """
    path, recipe = directory.path, directory.recipe()
    results = directory.results(whole=True)
    if results is None:
        raise StorageError(
            f"{path}: is not finished; `fedex-lora resume {path}` comes first, then `rounds`"
        )
    before = recipe.federation.rounds
    if results["rounds"] < before:
        raise RecipeError(
            f"{path}: ended after round {results['rounds']} of {before}, by evaluation.patience or "
            "its privacy budget; more rounds change nothing"
        )
    if recipe.privacy.example_level is not None:
        raise RecipeError(
            f"{path}: its noise was planned for {before} rounds (privacy.example_level); more of "
            "them would spend more than that"
        )
    with directory.held():
        taken = [part for part in directory.extensions() if part["to"] <= before]
        part = {"from": before, "to": before + rounds}
        directory.write_json(EXTENDED, [*taken, part])
        federation = recipe.federation.model_copy(update={"rounds": part["to"]})
        longer = recipe.model_copy(update={"federation": federation})
        write_atomic(path / "recipe.yaml", dump_recipe(longer).encode())
        directory.set_aside(path / f"after-round-{before}")
    return part["to"]


def extended(record: Mapping[str, Any], parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What the record of a round says if the run was to end before it.

    Example:
        >>> extended({"round": 3}, [{"from": 2, "to": 5}]), extended({"round": 2}, [])
        ({'extends': 2}, {})
    """
    ends = [part["from"] for part in parts if part["from"] < record["round"]]
    return {"extends": ends[-1]} if ends else {}
