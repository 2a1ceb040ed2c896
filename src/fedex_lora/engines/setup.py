"""From a recipe to everything a run needs: task, rows, model, settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets

from fedex_lora.aggregation.adapter import AdapterState, fresh
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.data.counts import Counts, scored_on, trained_on
from fedex_lora.data.load import (
    known_labels,
    load_evaluation,
)
from fedex_lora.data.places import places
from fedex_lora.data.read import quiet
from fedex_lora.data.stored import encoded as encoded_on_disk
from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.fits import check_image, check_length, check_ranks
from fedex_lora.engines.private.begin import check_model
from fedex_lora.engines.rows import Rows, client_rows, load_rows
from fedex_lora.engines.training import try_settings
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.settings import Settings
from fedex_lora.model.adapted import AdaptedModel, load_model
from fedex_lora.model.architectures import Architecture, architecture
from fedex_lora.model.load import unheard
from fedex_lora.recipe import LoraSpec, Recipe
from fedex_lora.tasks import Task, build_task
from fedex_lora.tasks.base import Encode, placed

POOLED = "all"  # the one client of a method that pools the data

_phase = logging.getLogger("fedex_lora.phase")  # what takes long, for who wants to know


@dataclass(frozen=True)
class Federation:
    """A recipe brought to life.

    Attributes:
        clients: Each training client's encoded rows.
        validation: Each silo's own validation rows, if clients evaluate; with pooled training too.
        evaluation: The server's evaluation rows by split, the selection split first.
        initial: What all clients start from, at the full rank.
        counts: How many rows there were and were not used: `training` and `own` by client,
            `evaluation` by split.
    """

    recipe: Recipe
    task: Task
    model: AdaptedModel
    settings: Settings
    clients: Mapping[str, Dataset]
    validation: Mapping[str, Dataset]
    evaluation: Mapping[str, Dataset]
    initial: AdapterState
    description: str
    counts: Mapping[str, Counts]

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of training examples by client."""
        return {name: len(rows) for name, rows in self.clients.items()}


@contextmanager
def surroundings(recipe: Recipe) -> Iterator[None]:
    """Runs a block with as many torch threads as the recipe says, on which bits depend, and
    without transformers' messages; then all is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.engine.threads)
    try:
        with unheard():
            yield
    finally:
        torch.set_num_threads(threads)


def set_up(recipe: Recipe, workdir: Path | None = None) -> Federation:
    """Loads data and model and checks everything that can be checked before training.

    Raises:
        UserError: Whatever is wrong with recipe, data or model.
    """
    task = recipe_task(recipe)
    rows = load_rows(recipe, task)
    pooled = METHODS[recipe.method.name].pooled
    return _bring_to_life(recipe, task, rows, [POOLED] if pooled else list(rows.train), workdir)


def set_up_server(recipe: Recipe, clients: list[str] | None = None) -> Federation:
    """The coordinator's part of a federation across machines: no training rows.

    Args:
        clients: The roster, in the order of `lora.ranks`; by default what the recipe says of it.

    Raises:
        UserError: Whatever is wrong with recipe, evaluation rows or model.
    """
    task, where = recipe_task(recipe), recipe.evaluation.where
    _phase.info("reading rows")
    evaluation = {} if where == "clients" else load_evaluation(recipe.data, task, recipe.seed)
    rows = Rows({}, {}, evaluation, "the institutions' own rows")
    return _bring_to_life(_alike(recipe), task, rows, clients or roster(recipe) or [], None)


def set_up_client(recipe: Recipe, name: str, file: Path | None = None) -> Federation:
    """One client's part of a federation across machines.

    Args:
        name: The client's.
        file: Its rows; without one they are its share of the recipe's own data.

    Raises:
        UserError: Whatever is wrong with recipe, rows or model.
    """
    task, known = recipe_task(recipe), roster(recipe)
    if recipe.lora.ranks is not None and name not in (known or []):
        raise RecipeError(f"lora.ranks: none for {name!r}; name it in federation.names")
    rows = client_rows(recipe, task, name, file)
    return _bring_to_life(_alike(recipe), task, rows, known or [name], None)


def _alike(recipe: Recipe) -> Recipe:
    """Machines that measured would choose differently: what is "auto" is what all of them can."""
    able = {"precision": "float32", "fuse": 1}
    return recipe.with_engine(
        **{key: value for key, value in able.items() if getattr(recipe.engine, key) == "auto"}
    )


def roster(recipe: Recipe) -> list[str] | None:
    """The clients' names, if the recipe gives them."""
    if recipe.data.clients is not None:
        return [name for name, _ in recipe.data.files()]
    return recipe.federation.names


def _check_fusable(task: Task, model: AdaptedModel, kind: str) -> None:
    if not task.fusable:
        raise RecipeError(
            f"engine.fuse: losses of a task of kind {kind} are not told apart by client; leave "
            "it out"
        )
    model.trained_layers()


def _bring_to_life(
    recipe: Recipe, task: Task, rows: Rows, names: list[str], workdir: Path | None
) -> Federation:
    _phase.info("loading the model, %s", recipe.model.name)
    model = recipe_model(recipe, task, workdir)
    check_length(recipe, task, model)
    if recipe.fused > 1:
        try:
            _check_fusable(task, model, recipe.task.kind)
        except UserError:
            if recipe.engine.fuse != "auto":
                raise
            recipe = recipe.with_engine(fuse=1)
    pooled = METHODS[recipe.method.name].pooled
    settings = federation_settings(recipe, model, names)
    check_ranks(recipe.lora, settings.layers)
    initial = model.initial(recipe.seed)
    if settings.ranks:
        initial = replace(initial, layers=fresh(settings.layers, recipe.seed))

    def encode(part: Mapping[str, Dataset], encoder: Encode, length: int) -> dict[str, Dataset]:
        found: dict[str, Dataset] = {}
        for name, own in part.items():
            with quiet(), placed(places(own, recipe.data, task, rows.files)):
                found[name] = encoder(own, model.tokenizer, length)
        return found

    _phase.info("preparing the rows")
    spec = recipe.task
    training = task.encode
    if recipe.data.on_disk and task.image is None:  # images are not made into pixels yet
        training = partial(encoded_on_disk, task.encode)
    clients = encode(rows.train, training, spec.max_length)
    evaluating = task.encode_evaluation or task.encode
    validation, evaluation = (
        encode(r, evaluating, spec.evaluated_length) for r in (rows.validation, rows.evaluation)
    )
    if task.check_room is not None:
        task.check_room(model.module, [*validation.values(), *evaluation.values()])
    counts = {
        "training": trained_on(rows.train, clients),
        "own": scored_on(rows.validation, validation),
        "evaluation": scored_on(rows.evaluation, evaluation),
    }
    if pooled:
        clients = {POOLED: concatenate_datasets(list(clients.values()))}
    if clients:
        _phase.info("trying the training settings")
        settings = replace(settings, examples={name: len(part) for name, part in clients.items()})
        check_shares(settings)
        smallest = min(clients.values(), key=len)
        check_image(task, model, smallest)
        if task.check_training is not None:
            task.check_training(model.module, smallest)
        try_settings(recipe.trainer_arguments, task, model, smallest)
        check_model(recipe, task, model, smallest, initial)
    return Federation(
        recipe,
        task,
        model,
        settings,
        clients,
        validation,
        evaluation,
        initial,
        rows.description,
        counts,
    )


def recipe_task(recipe: Recipe) -> Task:
    """The task; some data bring their own labels."""
    return build_task(recipe.task, known_labels(recipe.data))


def recipe_model(recipe: Recipe, task: Task, workdir: Path | None = None) -> AdaptedModel:
    """The pretrained model, adapted as the recipe's method needs it."""
    return load_model(
        recipe.model,
        _lora(recipe),
        auto_model=task.auto_model,
        peft_task_type=task.peft_task_type,
        model_kwargs=task.model_kwargs(),
        seed=recipe.seed,
        workdir=workdir,
        processor=task.processor,
    )


def architecture_of(recipe: Recipe, task: Task) -> Architecture:
    """The shapes of that model, without its weights.

    Raises:
        UserError: They are not known here, or there are none.
    """
    return architecture(
        recipe.model.name,
        _lora(recipe),
        auto_model=task.auto_model,
        peft_task_type=task.peft_task_type,
        model_kwargs=task.model_kwargs(),
        revision=recipe.model.revision,
    )


def _lora(recipe: Recipe) -> LoraSpec | None:
    return None if METHODS[recipe.method.name].trains == "all" else recipe.lora
