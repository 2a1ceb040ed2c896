"""From a recipe to private training: what is settled and checked before round 1.

What needs Opacus or dp-accounting is imported when a recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.turn import OnTurn, Train
from fedex_lora.errors import RecipeError, check_installed
from fedex_lora.federation.settings import Settings
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Collate

if TYPE_CHECKING:
    from fedex_lora.engines.private.account import Spending
    from fedex_lora.engines.private.losses import Losses
    from fedex_lora.engines.private.own_account import OwnAccount
    from fedex_lora.engines.private.plan import Plan


PRIVACY = "privacy.json"  # a client's own account
_TRIED = 3  # rows whose gradients are compared


def check_model(
    recipe: Recipe, task: Task, model: AdaptedModel, rows: Dataset, initial: AdapterState
) -> None:
    """Tries gradients by example on some of a client's rows; the model's factors change.

    Raises:
        UserError: Opacus is not installed, or cannot do this model.
    """
    if recipe.privacy.example_level is None:
        return
    for module in ("opacus", "dp_accounting"):
        check_installed(module, "privacy.example_level")
    try_rows(model, task.collator(model.tokenizer), rows, initial, task.regression)


def try_rows(
    model: AdaptedModel,
    collate: Collate,
    rows: Dataset,
    initial: AdapterState,
    regression: bool,
    losses: Losses | None = None,
) -> None:
    """Whether gradients of some rows in one batch are those of each by itself, where B ≠ 0."""
    from fedex_lora.engines.private.gradients import check_gradients  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    moved = {  # at B = 0 the gradient of A is zero
        n: replace(f, B=f.B + 0.1 * torch.randn(f.B.shape, generator=generator))
        for n, f in initial.layers.items()
    }
    model.write(AdapterState(moved, initial.head))
    model.freeze(frozenset("AB"))
    chosen = [rows[i] for i in _unlike(rows)]
    alone, together = [collate([row]) for row in chosen], collate(chosen)
    check_gradients(model, alone, together, regression, losses)
    model.write(initial)


def _unlike(rows: Dataset) -> list[int]:
    """The shortest row, the longest, and one between them."""
    order = list(range(len(rows)))
    if "input_ids" in getattr(rows, "column_names", ()):
        lengths = [len(ids) for ids in rows["input_ids"]]
        order.sort(key=lambda i: lengths[i])
    return sorted({order[0], order[len(order) // 2], order[-1]})[:_TRIED]


def plan_of(
    recipe: Recipe, settings: Settings, rows: Mapping[str, int], elsewhere: bool = False
) -> Plan | None:
    """The noise of each client and the last round that fits; None where nothing is private.

    Args:
        elsewhere: Whether clients are on other machines: they do not know when they will be asked,
            and find noise for all rounds.

    Raises:
        UserError: Not one round fits, or no account can be given.
    """
    spec = recipe.privacy.example_level
    if spec is None:
        return None
    from fedex_lora.engines.private.plan import plan  # noqa: PLC0415

    rounds = range(1, recipe.federation.rounds + 1)
    schedule = [settings.sample(round) for round in rounds]
    if elsewhere and spec.noise_multiplier is None:
        schedule = [sorted(rows) for _ in rounds]
    return plan(spec, recipe.trainer_arguments, rows, schedule)


def private_trainer(
    recipe: Recipe,
    task: Task,
    plan: Plan,
    account: Spending | None = None,
    on_step: OnTurn | None = None,
) -> Train:
    """The training that a plan is about.

    Args:
        account: Where clients take down what they spend; by default in memory.
    """
    from fedex_lora.engines.private.account import Accounts  # noqa: PLC0415
    from fedex_lora.engines.private.train import PrivateTrainer  # noqa: PLC0415

    spec = recipe.privacy.example_level
    assert spec is not None
    return PrivateTrainer(
        task,
        recipe.trainer_arguments,
        spec.max_grad_norm,
        plan.noise,
        account or Accounts(spec.delta, spec.epsilon),
        recipe.privacy.rehearsal,
        on_step,
    )


def own_account(
    recipe: Recipe, path: Path, file: Path | None, run: str, most: float | None
) -> OwnAccount | None:
    """A client's own account, on its own disk; None where neither recipe nor operator asks for it.

    Args:
        path: Of the account.
        file: The client's rows; None where they are of the recipe's own data.
        run: The run's number.
        most: ε that its operator allows over all runs.

    Raises:
        UserError: The operator allows only so much, and the recipe's training is not private.
    """
    spec = recipe.privacy.example_level
    if spec is None:
        if most is not None:
            raise RecipeError(
                f"`epsilon`: {most:g}, but training by this recipe spends without limit; agree on "
                "one with privacy.example_level, or leave `epsilon` out"
            )
        return None
    check_installed("dp_accounting", "privacy.example_level")
    from fedex_lora.engines.private.own_account import OwnAccount, names_of  # noqa: PLC0415

    if recipe.privacy.rehearsal and most is not None:
        raise RecipeError(
            "`epsilon`: with privacy.rehearsal nothing is hidden; agree on a recipe without it"
        )
    names = names_of(file, recipe.data.model_dump_json())
    return OwnAccount(path, names, run, spec.delta, spec.epsilon, most)


def notes(recipe: Recipe, plan: Plan, clients: Sequence[str]) -> Iterator[str]:
    """What those who run it should know before round 1."""
    spec = recipe.privacy.example_level
    assert spec is not None
    if recipe.privacy.rehearsal:
        yield (
            "not private: with privacy.rehearsal the noise follows from the seed, and whoever has "
            "the recipe can subtract it"
        )
    else:
        yield "private training does not repeat bit for bit: its noise follows from no seed"
    noise = [plan.noise[client] for client in clients if client in plan.noise]
    if noise:
        least, most = min(noise), max(noise)
        told = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        bound = "any" if spec.epsilon is None else f"{spec.epsilon:g}"
        yield f"noise multiplier {told}, for ε up to {bound} at δ = {spec.delta:g}"
    if plan.rounds < recipe.federation.rounds:
        yield (
            f"ε = {spec.epsilon:g} allows {plan.rounds} of {recipe.federation.rounds} rounds; the "
            "run ends with the last that fits"
        )
    if recipe.evaluation.where != "server":
        yield "scores on clients' own validation rows are told as they are, without noise"
