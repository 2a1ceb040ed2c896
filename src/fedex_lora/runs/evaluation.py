"""Scoring any model on any task, without a federation: a run, a plain model or a PEFT adapter."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from fedex_lora.data.counts import scored_on
from fedex_lora.data.load import load_evaluation
from fedex_lora.data.places import places
from fedex_lora.data.read import quiet
from fedex_lora.engines.fits import check_image, check_length
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.federation.codec import ledger_tensors
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.config import CONFIG, adapter_folder, published
from fedex_lora.model.ready import base_of, load_ready
from fedex_lora.recipe import Recipe
from fedex_lora.runs.export import final_state
from fedex_lora.runs.reopened import Which, open_run
from fedex_lora.runs.rundir import SCORES, RunDir, environment, plain
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import placed
from fedex_lora.tasks.outputs import OutputFile

Kind = Literal["run", "adapter", "model"]
OnProgress = Callable[[str, int, int], None]  # (split, texts generated, texts in all)

ASKED = "evaluation.json"


@dataclass(frozen=True)
class Subject:
    """A model that is to be scored, with all its weights in place.

    Attributes:
        name: What it is, for people.
        beside: What it adds to its parameters' outputs: a run's ledger.
        notes: What the user should know.
    """

    model: AdaptedModel
    name: str
    beside: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def kind_of(what: str) -> Kind:
    """Whether that is a run's directory, a PEFT adapter's, or (the name of) a model.

    Raises:
        UserError: It is a path at which there is nothing of these.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        files: dict[str, Kind] = {"recipe.yaml": "run", CONFIG: "adapter", "config.json": "model"}
        for file, kind in files.items():
            if (path / file).is_file():
                return kind
        if (adapter_folder(path) / CONFIG).is_file():
            return "adapter"
        raise StorageError(f"{what}: no run there, no model and no adapter (no {_or(files)})")
    looks_local = what.startswith((".", "/", "~")) or what.count("/") > 1 or path.is_file()
    if looks_local and not what.startswith("package:"):
        raise StorageError(
            f"{what}: no such directory; expected one of a run, a model or a PEFT adapter, or a "
            "model's hub id"
        )
    return "model"


def _or(names: Mapping[str, Any]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def load_subject(
    what: str, recipe: Recipe, which: Which | int = "best", client: str | None = None
) -> Subject:
    """The model to be scored.

    Args:
        what: A run's or an adapter's directory, or a model.
        recipe: What is asked: its blocks `model` (of a run it must be the run's own; of an
            adapter it is the base) and `task`.
        which: A run's round.
        client: Whose model, of a run whose clients exchange nothing.

    Raises:
        UserError: There is none, or it does not fit the task.
    """
    task, kind = recipe_task(recipe), kind_of(what)
    if kind == "run":
        subject = _run(Path(what).expanduser(), recipe, task, which, client)
    else:
        folder = Path(what).expanduser() if kind == "adapter" else None
        model = load_ready(
            recipe.model,
            folder,
            auto_model=task.auto_model,
            model_kwargs=task.model_kwargs(),
            seed=recipe.seed,
            processor=task.processor,
        )
        # the names in the config of an adapter's base are the task's, just given
        named = folder is None and _check_classes(what, model, task)
        notes: list[str] = []
        if task.labels is not None and not named:
            order = ", ".join(task.labels)
            notes.append(f"{what} has no names for its classes; taken as {order}, in this order")
        subject = Subject(model, what, {}, tuple(notes))
    check_length(recipe, task, subject.model)
    return subject


def model_block(what: str) -> dict[str, str]:
    """The `model` block for a model, or for the base that an adapter's config names.

    An adapter in a run's own directory is on the run's base, wherever that lies.
    """
    if kind_of(what) != "adapter":
        return {"name": what}
    folder = adapter_folder(Path(what).expanduser().resolve())
    run = RunDir(folder.parent.parent)
    block = base_of(folder)
    if run.final == folder.parent and run.is_run():
        own = run.recipe().model.name
        return {**block, "name": own} if published(own) == block.get("name") else block
    return block


def _run(path: Path, recipe: Recipe, task: Task, which: Which | int, client: str | None) -> Subject:
    own = recipe_task(RunDir(path).recipe())
    for what, theirs, ours in (
        ("kind of model", own.auto_model, task.auto_model),
        ("classes", own.labels, task.labels),
    ):
        if theirs != ours:
            raise RecipeError(
                f"task: the run's {what}: {_shown(theirs)}; the task's: {_shown(ours)}. A model "
                "can only be scored on what it was trained to tell"
            )
    trained = open_run(path, which)
    if trained.recipe.model != recipe.model:
        raise RecipeError(
            "model: that of a run is as it was trained; leave what sets model out, or export the "
            "run and evaluate the export"
        )
    final_state(trained, client)  # says whether a client is to be named
    trained.show(client)
    whose = f", {client}" if client else ""
    name = f"{path}, round {trained.state.version}{whose}"
    tensors = ledger_tensors(trained.state.ledger.since(0))
    return Subject(trained.model, name, tensors, trained.notes)


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value or "none")


def _check_classes(what: str, model: AdaptedModel, task: Task) -> bool:
    """Classes go by number, so that another order would make right answers wrong ones.

    Returns:
        Whether the model has names for its classes.
    """
    config = model.module.config
    if task.labels is None:
        if task.regression and config.num_labels != 1:
            raise RecipeError(f"{what}: tells {config.num_labels} classes; {task.name} is a number")
        return True
    default = [f"LABEL_{i}" for i in range(config.num_labels)]
    names = [str(config.id2label.get(i, name)) for i, name in enumerate(default)]
    if names == default and len(names) == len(task.labels):
        return False
    if [n.lower() for n in names] != [n.lower() for n in task.labels]:
        raise RecipeError(
            f"{what}: its classes are {', '.join(names)}; those of {task.name} are "
            f"{', '.join(task.labels)}. They must be the same in the same order: take another "
            "model, or a task of kind text-classification with the model's classes as task.labels"
        )
    return True


def evaluate(
    subject: Subject,
    recipe: Recipe,
    out: Path | None = None,
    split: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Scores on all labelled evaluation splits, or on one.

    Texts that a task generates are kept in `out` as they are made: an evaluation that was
    interrupted goes on where it was, one that is finished is not made again.

    Args:
        recipe: Its blocks task, data, evaluation (`batch_size`) and engine (`threads`), and seed.
        out: A directory; by default one under `runs` that this evaluation alone has.
        split: Its name; None for all of the task's.

    Returns:
        The directory and what `scores.json` there says.

    Raises:
        UserError: Rows the task cannot use, or `out` holds something else.
    """
    task = recipe_task(recipe)
    rows = load_evaluation(recipe.data, task, recipe.seed, split)
    encode, length = task.encode_evaluation or task.encode, recipe.task.evaluated_length
    encoded: dict[str, Dataset] = {}
    for name, part in rows.items():
        with quiet(), placed(places(part, recipe.data, task)):
            encoded[name] = encode(part, subject.model.tokenizer, length)
    check_image(task, subject.model, next(iter(encoded.values())))
    counts = scored_on(rows, encoded)
    key = _digest(subject, recipe, encoded)
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"evaluate-{subject.name}-{task.name}")
    directory = RunDir(out or Path("runs") / f"{name[-100:].strip('-')}-{key[:8]}")
    asked = {
        "model": subject.name,
        "task": recipe.task.model_dump(mode="json", exclude_none=True),
        "data": recipe.data.model_dump(mode="json", exclude_none=True),
        "rows": {name: len(part) for name, part in encoded.items()},
        "digest": key,
    }
    if (done := _begin(directory, asked)) is not None:
        return directory.path, done
    model, scores = subject.model, {}
    for name, part in encoded.items():
        tell = None if on_progress is None else partial(on_progress, name)
        outputs = OutputFile(directory.path / f"outputs-{name}.jsonl", key, tell)
        size = recipe.evaluation.batch_size
        scores[name] = task.evaluate(model.module, part, model.tokenizer, size, outputs)
    scores |= task.average(scores)
    results = {
        **asked,
        "counts": counts,
        "scores": scores,
        "environment": environment(model.device),
        "notes": subject.notes,
    }
    directory.write_json(SCORES, results)
    return directory.path, plain(results)


def _begin(directory: RunDir, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes the directory; if this very evaluation is finished there, what it found."""
    path = directory.path
    stored = directory.read_json(ASKED)
    if stored is None:
        directory.check_free()
        directory.make(path)
        directory.write_json(ASKED, asked)
        return None
    then = stored if isinstance(stored, dict) else {}
    if then.get("digest") != asked["digest"]:
        now = json.loads(json.dumps(asked))
        differ = [k for k in ("model", "task", "data", "rows") if then.get(k) != now[k]]
        raise RecipeError(
            f"{path}: holds another evaluation (of another "
            f"{' and '.join(differ) or 'state of the model or the rows'}); name another directory "
            "with `out`"
        )
    return directory.evaluated()


def _digest(subject: Subject, recipe: Recipe, encoded: Mapping[str, Dataset]) -> str:
    """SHA-256 of all that decides the outputs but for rounding: weights, task and rows."""
    digest = hashlib.sha256(recipe.task.model_dump_json().encode())
    state = subject.model.module.state_dict() | dict(subject.beside)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for text in _texts(encoded):
        digest.update(text.encode())
    return digest.hexdigest()


def _texts(encoded: Mapping[str, Dataset]) -> Iterator[str]:
    for name, rows in encoded.items():
        yield name
        for part in rows.with_format("arrow").iter(1000):
            yield repr(part.to_pylist())  # type: ignore[union-attr]
