"""From a recipe to everything a run needs: task, rows, model, settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets

from fedex_lora.aggregation.adapter import AdapterState, fresh
from fedex_lora.aggregation.asynchronous import Asynchronous
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.data.counts import Counts, scored_on, trained_on
from fedex_lora.data.load import (
    known_labels,
    load,
    load_client,
    load_evaluation,
    load_validation,
)
from fedex_lora.data.partition import partition, split_validation
from fedex_lora.data.places import no_split, places
from fedex_lora.data.read import quiet
from fedex_lora.data.stored import encoded as encoded_on_disk
from fedex_lora.engines.fits import check_image, check_length, check_ranks
from fedex_lora.engines.private.begin import check_model
from fedex_lora.engines.training import try_settings
from fedex_lora.errors import RecipeError, UserError, Withheld
from fedex_lora.federation.checks import check_shares
from fedex_lora.federation.noise import SumNoise, split
from fedex_lora.federation.settings import Secure, Settings
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


@dataclass(frozen=True)
class Rows:
    """The rows of all parties before encoding."""

    train: Mapping[str, Dataset]
    validation: Mapping[str, Dataset]
    evaluation: Mapping[str, Dataset]
    description: str
    files: tuple[Path, ...] = ()  # that the recipe does not name


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


def federation_settings(
    recipe: Recipe, model: AdaptedModel | Architecture, clients: list[str]
) -> Settings:
    """The settings of the federation; the one client of pooled data has no partners to wait for."""
    fed, method = recipe.federation, recipe.method.chosen
    ranks = dict(zip(clients, recipe.lora.ranks or [])) if not method.pooled else {}
    widest = max(ranks.values(), default=0)
    layers = {n: s.at_rank(widest) if widest else s for n, s in model.layers.items()}
    level, of_rows = recipe.privacy.client_level, recipe.privacy.example_level
    return Settings(
        method=method,
        seed=recipe.seed,
        clients=tuple(sorted(clients)),
        layers=layers,
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
        oversample=fed.oversample,
        max_norm=fed.max_norm,
        clip=level.clip if level is not None and level.adaptive else None,
        epsilon=None if of_rows is None else of_rows.epsilon or math.inf,
        norm_ratio=fed.max_norm_ratio,
        max_share=fed.max_share,
        secure=secure_settings(recipe),
        mean=fed.mean,
        liars=fed.liars,
        align=fed.align,
        optimizer=fed.optimizer,
        scaffold=fed.scaffold,
        spectrum=recipe.records.spectrum,
        asynchronous=fed.asynchronous and Asynchronous(**fed.asynchronous.model_dump()),
    )


def secure_settings(recipe: Recipe) -> Secure | None:
    """How updates are summed, if only sums are to be seen. By default more than half of a round's
    clients must stay, by everybody's own recipe: nobody sums over fewer because a server says so.
    """
    asked = recipe.privacy.secure_aggregation
    if asked is None:
        return None
    least = asked.threshold or recipe.federation.sampled // 2 + 1
    noise, level = None, recipe.privacy.client_level
    if level is not None:
        of_sum, of_count = level.noise_multiplier, None
        if level.adaptive:
            of_sum, of_count = split(level.noise_multiplier, recipe.federation.sampled)
        seed = recipe.seed if recipe.privacy.rehearsal else None
        noise = SumNoise(level.clip, of_sum * level.clip, least, seed, of_count)
    rank = None if asked.rank == "exact" else asked.rank
    return Secure(least, asked.bits, rank, noise, asked.repeat)
