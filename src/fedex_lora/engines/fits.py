"""Whether a recipe fits its model: what the layers, the positions and the images of it tell."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from datasets import Dataset

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.errors import RecipeError
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import LoraSpec, Problem, Recipe
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import learned_positions

_log = logging.getLogger(__name__)


def rank_problems(lora: LoraSpec, layers: Mapping[str, LayerShape]) -> Iterator[Problem]:
    """Ranks above the sides of all layers that have them."""
    for rank, sides in _sides(layers).items():
        if rank > max(sides.values()):
            shape = _narrowest(layers, sides)
            text = f"{rank} is more than any rank that the adapted layers can have ({shape})"
            yield _key(lora, rank), f"{text}; set it to {max(sides.values())} or less"


def check_ranks(lora: LoraSpec, layers: Mapping[str, LayerShape]) -> None:
    """Raises a `UserError` for a rank that no layer can have; one that some cannot have is told."""
    for key, text in rank_problems(lora, layers):
        raise RecipeError(f"{key}: {text}")
    for rank, sides in _sides(layers).items():
        if rank > min(sides.values()):
            shape = _narrowest(layers, sides)
            _log.warning("rank %d is more than some layers can have (%s)", rank, shape)


def _sides(layers: Mapping[str, LayerShape]) -> dict[int, dict[str, int]]:
    """The shorter side of every layer, by rank and name."""
    found: dict[int, dict[str, int]] = {}
    for name, layer in layers.items():
        found.setdefault(layer.rank, {})[name] = min(layer.out, layer.inp)
    return found


def _narrowest(layers: Mapping[str, LayerShape], sides: Mapping[str, int]) -> str:
    name = min(sides, key=lambda layer: sides[layer])
    return f"{name} is {layers[name].out} × {layers[name].inp}"


def _key(lora: LoraSpec, rank: int) -> str:
    if rank in (lora.ranks or []):
        return "lora.ranks"
    patterns = (f"lora.rank_pattern.{name}" for name, r in lora.rank_pattern.items() if r == rank)
    return "lora.r" if rank == lora.r else next(patterns, "lora.r")


def check_length(recipe: Recipe, task: Task, model: AdaptedModel) -> None:
    """Learned positions end; rotary ones do not, so only the former are a limit.

    Raises:
        UserError: `task.max_length` is more than the model takes.
    """
    limit = None if task.image else learned_positions(model.module)
    for key in ("max_length", "evaluation_max_length", "max_target_length"):
        asked = getattr(recipe.task, key, None)
        if limit is not None and asked is not None and asked > limit:
            raise RecipeError(
                f"task.{key}: {asked}, but {recipe.model.name} takes at most {limit} tokens; set "
                f"it to {limit} or less"
            )


def check_image(task: Task, model: AdaptedModel, rows: Dataset) -> None:
    """Puts one image through the model: whether pixels fit shows in no config.

    Raises:
        UserError: The model does not take what its image processor makes of the image.
    """
    if task.image is None:
        return
    try:
        task.evaluate(model.module, rows.select([0]), model.tokenizer, 1)
    except (ValueError, RuntimeError, TypeError) as error:
        raise RecipeError(
            f"model.name: the model cannot use what its image processor makes: {error}. "
            "Expected a preprocessor_config.json that goes with config.json"
        ) from error
