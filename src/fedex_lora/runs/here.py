"""Assembles a run in this process: all rows, one model, clients that take turns on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.fused.train import Fused
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.own_loop import own_loop
from fedex_lora.engines.private.begin import plan_of, private_trainer
from fedex_lora.engines.setup import Federation, set_up
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.training_log import TrainingLog
from fedex_lora.engines.transforms import clipped
from fedex_lora.engines.turn import Train, Turn
from fedex_lora.errors import RecipeError
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.extensions import TRANSPORTS
from fedex_lora.runs import private
from fedex_lora.runs.autotune import settle_fuse, settle_precision
from fedex_lora.runs.rundir import BY_HAND, OUTPUTS
from fedex_lora.runs.secure import lacking
from fedex_lora.runs.watch import Watcher

Assemble = Callable[[Recipe, Path, list[str] | None, Watcher], tuple[Federation, Engine]]
"""(recipe, run's directory, clients of a run that is resumed, watcher) → what is run, and how."""


def in_this_process(
    recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
) -> tuple[Federation, Engine]:
    """Everything of a recipe here: all rows, one model, the local engine."""
    if (out / BY_HAND).is_file():
        raise RecipeError(
            f"{out}: its rounds are carried by hand; go on with `fedex-lora round open {out}`"
        )
    if recipe.engine.kind != "local":
        raise RecipeError(
            f"engine.kind: {recipe.engine.kind} is for `fedex-lora run`; for this command set "
            "engine.kind=local"
        )
    federation, told = settle_precision(set_up(recipe))
    federation, more = settle_fuse(federation)
    for text in filter(None, (told, more)):
        watcher.note(text)
    federation = private.settle(federation, watcher)
    if recipe.privacy.secure_aggregation is not None:
        watcher.note(lacking(recipe))
    return federation, local_engine(federation, watcher, out)


def by_kind(
    recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
) -> tuple[Federation, Engine]:
    """By the transport that `engine.kind` names, where one is registered; else in this process."""
    kind = recipe.engine.kind
    assemble: Assemble = TRANSPORTS.one(kind) if kind in TRANSPORTS else in_this_process
    return assemble(recipe, out, clients, watcher)


def local_engine(
    federation: Federation, watcher: Watcher | None = None, out: Path | None = None
) -> LocalEngine:
    """The engine whose clients take turns in this process; its logs go into the run's directory."""
    recipe, log = federation.recipe, None
    if out is not None:
        name = f"{recipe.name}-{recipe.method.name}-seed{recipe.seed}"
        log = TrainingLog(out / "logs", recipe.training.get("run_name") or name)

    def tell(turn: Turn, done: int, total: int, loss: float | None = None) -> None:
        if watcher is not None:
            watcher.turn(turn.round, turn.client, done, total, loss)

    task, training, on_step = federation.task, recipe.trainer_arguments, tell if watcher else None
    plan = plan_of(recipe, federation.settings, federation.examples)
    if plan is not None:
        train: Train = private_trainer(recipe, task, plan, on_step=on_step)
    elif (loop := own_loop(recipe)) is not None:
        train = loop
    elif recipe.fused > 1:
        train = Fused(task, training, recipe.fused, on_step, log)
    else:
        train = HFTrainer(task, training, on_step, log, recipe.federation.proximal)
    return LocalEngine(
        stage_of(federation, out),
        federation.clients,
        federation.settings,
        federation.initial,
        train,
        federation.validation,
        recipe.federation.failure_rate,
        clipped(recipe),
    )


def stage_of(federation: Federation, out: Path | None = None) -> Stage:
    """The federation's one model, to train and to score on; `out` is the run's directory."""
    size = federation.recipe.evaluation.batch_size
    method = federation.settings.method
    return Stage(federation.model, federation.task, method, size, out and out / OUTPUTS)
