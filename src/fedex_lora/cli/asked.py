"""What `evaluate` is asked to do, as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedex_lora.data.load import SOURCES
from fedex_lora.data.read import SUFFIXES, kind
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.recipe import Recipe, spec_of
from fedex_lora.recipe.draft import Places
from fedex_lora.recipe.reader import drafted
from fedex_lora.runs.evaluation import kind_of, model_block
from fedex_lora.runs.rundir import RunDir

_BLOCKS = ("model", "task", "data", "evaluation.batch_size", "engine.threads", "seed")


def asked(what: str, task: str | None, data: str | None, sets: list[str]) -> Recipe:
    """What an evaluation needs, as a recipe whose other blocks are not used.

    Args:
        what: A run, from which comes what is not given; a model, or an adapter.
        task: KIND or KIND/NAME.
        data: A file, a directory, a built-in source, or a hub id with `:CONFIG`.
        sets: Overrides of single keys.

    Raises:
        UserError: Something is missing or wrong; one line for each problem.
    """
    _check_keys(sets)
    places, run = Places(""), kind_of(what) == "run"
    raw: dict[str, Any] = {"name": "evaluation", **(_of_run(what) if run else {})}
    if not run:
        raw["model"] = model_block(what)
    if task:
        raw["task"] = _task(task, sets)
        places.known["task",] = f"--task {task}"
    if data:
        raw["data"] = _data(data)
        places.known["data",] = f"--data {data}"
    for block, option in (("task", task), ("data", data)):
        if not run and not option and not any(s.startswith(f"{block}.") for s in sets):
            raise RecipeError(
                f"--{block}: missing; {what} is no run's directory, and a model alone does not say "
                "what it is for"
            )
    recipe = drafted(raw, places, sets, stored=run).settled()
    if kind_of(what) == "model" and recipe.model.name != what:
        raise RecipeError(f"--set model.name: the model is {what}, and has no other base")
    return recipe


def _check_keys(sets: list[str]) -> None:
    for text in sets:
        key = text.partition("=")[0].strip()
        if not any(key == block or key.startswith(f"{block}.") for block in _BLOCKS):
            raise RecipeError(f"--set {text}: not used here; only {', '.join(_BLOCKS)} are")


def _of_run(what: str) -> dict[str, Any]:
    recipe = RunDir(Path(what).expanduser()).recipe()
    whole = recipe.model_dump(mode="json", exclude_none=True)
    kept = {key: whole[key] for key in ("seed", "model", "task", "data")}
    size = {"batch_size": recipe.evaluation.batch_size}
    return {**kept, "evaluation": size, "engine": {"threads": recipe.engine.threads}}


def _task(text: str, sets: list[str]) -> dict[str, Any]:
    kind, _, name = text.partition("/")
    block: dict[str, Any] = {"kind": kind, **({"name": name} if name else {})}
    answers = any(s.startswith(("task.generate", "task.score", "task=")) for s in sets)
    spec = spec_of(kind)
    return block | (dict(spec.scored) if spec and not answers else {})


def _data(text: str) -> dict[str, Any]:
    path = Path(text).expanduser()
    if text in SOURCES:
        return {"source": text}
    if path.exists():
        return {"path": str(path)}
    if kind(path) in SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise StorageError(
            f"--data: there is no {text}; expected a file ({', '.join(SUFFIXES)}), a directory "
            f"with splits, a hub id with :CONFIG if it has some, or one of {', '.join(SOURCES)}"
        )
    name, _, config = text.partition(":")
    return {"name": name, **({"config": config} if config else {})}
