"""From a recipe to everything a run needs: task, rows, model, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging as transformers_logging

from fedex_lora.adapter import AdapterState, fresh
from fedex_lora.client import rehearse
from fedex_lora.data.load import known_labels, load
from fedex_lora.data.partition import partition, split_validation
from fedex_lora.errors import UserError
from fedex_lora.federation.settings import Settings
from fedex_lora.methods import METHODS
from fedex_lora.model import AdaptedModel, load_model
from fedex_lora.recipe import Recipe
from fedex_lora.tasks import Task, build_task

POOLED = "all"  # the one client of a method that pools the data


@dataclass(frozen=True)
class Federation:
    """A recipe brought to life.

    Attributes:
        clients: Each training client's encoded rows.
        validation: Each silo's own validation rows, if clients evaluate; with pooled training too.
        evaluation: The server's evaluation rows by split, the selection split first.
        initial: What all clients start from, at the full rank.
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


@dataclass(frozen=True)
class Rows:
    """The rows of all parties before encoding."""

    train: Mapping[str, Dataset]
    validation: Mapping[str, Dataset]
    evaluation: Mapping[str, Dataset]
    description: str


def set_up(recipe: Recipe, workdir: Path | None = None) -> Federation:
    """Loads data and model and checks everything that can be checked before training.

    Raises:
        UserError: Whatever is wrong with recipe, data or model.
    """
    torch.set_num_threads(recipe.engine.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    task = recipe_task(recipe)
    rows = load_rows(recipe, task)
    model = recipe_model(recipe, task, workdir)
    _check_length(recipe, model)
    pooled = METHODS[recipe.method.name].pooled
    settings = federation_settings(recipe, model, [POOLED] if pooled else list(rows.train))
    initial = model.initial(recipe.seed)
    if settings.ranks:
        initial = replace(initial, sites=fresh(settings.sites, recipe.seed))
    length = recipe.task.max_length

    def encode(part: Mapping[str, Dataset]) -> dict[str, Dataset]:
        return {n: task.encode(r, model.tokenizer, length) for n, r in part.items()}

    clients = encode(rows.train)
    if pooled:
        clients = {POOLED: concatenate_datasets(list(clients.values()))}
    rehearse(model, task, min(clients.values(), key=len), recipe.training)
    return Federation(
        recipe,
        task,
        model,
        settings,
        clients,
        encode(rows.validation),
        encode(rows.evaluation),
        initial,
        rows.description,
    )


def _check_length(recipe: Recipe, model: AdaptedModel) -> None:
    """Learned positions end; rotary ones do not, so only the former are a limit."""
    limit = model.longest_input
    if limit is not None and recipe.task.max_length > limit:
        raise UserError(
            f"task.max_length: {recipe.task.max_length}, but {recipe.model.name} takes at most "
            f"{limit} tokens; set it to {limit} or less"
        )


def recipe_task(recipe: Recipe) -> Task:
    """The task; some data bring their own labels."""
    return build_task(recipe.task, known_labels(recipe.data))


def recipe_model(recipe: Recipe, task: Task, workdir: Path | None = None) -> AdaptedModel:
    """The pretrained model, adapted as the recipe's method needs it."""
    return load_model(
        recipe.model,
        None if METHODS[recipe.method.name].trains == "all" else recipe.lora,
        auto_model=task.auto_model,
        peft_task_type=task.peft_task_type,
        model_kwargs=task.model_kwargs(),
        seed=recipe.seed,
        workdir=workdir,
    )


def load_rows(recipe: Recipe, task: Task) -> Rows:
    """Rows by client, dealt out or one file each, and the evaluation splits."""
    data = load(recipe.data, task, recipe.seed)
    fed = recipe.federation
    train = data.clients
    if train is None:
        assert data.train is not None
        train = partition(data.train, fed.partition, fed.clients, recipe.seed, task)
    validation: dict[str, Dataset] = {}
    if recipe.evaluation.where != "server":
        fraction = recipe.evaluation.client_fraction
        split = {n: split_validation(r, fraction, recipe.seed, n) for n, r in train.items()}
        train = {n: t for n, (t, _) in split.items()}
        validation = {n: v for n, (_, v) in split.items()}
    evaluation = data.evaluation if recipe.evaluation.where != "clients" else {}
    if not evaluation and recipe.evaluation.where != "clients":
        raise UserError(
            f"evaluation.where: {recipe.evaluation.where}, but the server has no labelled rows to "
            "evaluate on; give a validation split with data.path, or set evaluation.where: clients"
        )
    return Rows(train, validation, evaluation, data.description)


def federation_settings(recipe: Recipe, model: AdaptedModel, clients: list[str]) -> Settings:
    """The settings of the federation; the one client of pooled data has no partners to wait for."""
    fed, method = recipe.federation, METHODS[recipe.method.name]
    ranks = dict(zip(clients, recipe.lora.ranks or [])) if not method.pooled else {}
    widest = max(ranks.values(), default=0)
    sites = {n: s.at_rank(widest) if widest else s for n, s in model.sites.items()}
    return Settings(
        method=method,
        seed=recipe.seed,
        clients=tuple(sorted(clients)),
        sites=sites,
        rounds=fed.rounds,
        ranks=ranks,
        rank=recipe.method.rank,
        carry=recipe.method.carry,
        flush=recipe.method.flush,
        weights=fed.weights,
        server_learning_rate=fed.server_learning_rate,
        clients_per_round="all" if method.pooled else fed.clients_per_round,
        min_clients=1 if method.pooled else fed.min_clients,
        wire_dtype=getattr(torch, fed.wire_dtype),
    )
