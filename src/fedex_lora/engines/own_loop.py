"""Training by a loop of the user's own over a plain module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.turn import Trained, Turn
from fedex_lora.errors import UserError
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.load import seeded
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.extensions import TRAIN_FUNCTIONS


def own_loop(recipe: Recipe) -> OwnLoop | None:
    """The registered loop that a recipe names in the Trainer's place (`engine.train`), if any."""
    name = recipe.engine.train
    return None if name is None else OwnLoop(TRAIN_FUNCTIONS.one(name))


@dataclass(frozen=True)
class OwnLoop:
    """A function that trains a module in place, as a way to train clients.

    Attributes:
        train: Is called with (module, rows, round=, client=, rng=). The module is in training
            mode; only what is to be trained requires gradients. `rng` is a torch.Generator that
            is a function of (seed, round, client), as are torch's global generators meanwhile. It
            returns a `Trained`.
    """

    train: Callable[..., Trained]
    together: int = 1

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        return [self._train(model, turn) for turn in turns]

    def _train(self, model: AdaptedModel, turn: Turn) -> Trained:
        if turn.gradients:
            raise UserError(
                "method: makes its factors from gradients, which HFTrainer computes; a train "
                "function cannot be asked for them"
            )
        if turn.pruning is not None:
            raise UserError(
                "method.options.decay: adds a penalty to the loss, which HFTrainer does; a train "
                "function has a loss of its own"
            )
        model.write(turn.start)
        model.freeze(turn.trained, turn.head)
        module, seed = model.module, derive(turn.seed, "train", turn.round, turn.client)
        before = _frozen(module)
        module.train()
        with seeded(seed):
            rng = torch.Generator().manual_seed(seed)
            found = self.train(module, turn.rows, round=turn.round, client=turn.client, rng=rng)
        name = getattr(self.train, "__name__", "the train function")
        if not isinstance(found, Trained):
            raise UserError(
                f"{name}: returned {type(found).__name__}; expected fedex_lora.Trained, with what "
                'it wants on record: Trained({"loss": 0.5})'
            )
        after = _frozen(module)
        if changed := [p for p, value in before.items() if after.get(p) != value]:
            raise UserError(
                f"{name}: changed {changed[0]}, which is frozen; give the optimizer only what has "
                "requires_grad, and load the model anew"
            )
        model.release()
        return Trained(found.metrics, model.read())


def _frozen(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Two numbers of every frozen parameter that nearly any change of it changes."""
    found = {}
    for name, p in module.named_parameters():
        if not p.requires_grad and not p.is_meta:
            value = p.detach().float()
            found[name] = value.sum(dtype=torch.float64).item(), value.norm().item()
    return found
