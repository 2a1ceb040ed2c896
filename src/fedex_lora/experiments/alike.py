"""Runs side by side differ in what is compared, and not in how their training rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedex_lora.recipe import Recipe


def in_common(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What `engine` leaves to be measured ("auto") and not each of these can have: the values that
    all can, by key. What is not in it may be measured.

    Clients in one pass, and bfloat16, give other last bits than clients one by one in float32, from
    which a long training makes another score. A method that can have no such pass would differ by
    that too from those it is compared with, and by its precision, which is measured pass by pass.
    Runs of one client are no measure: they have no pass.

    Example:
        >>> from fedex_lora.recipe import Recipe
        >>> raw = {"name": "r", "model": {"name": "m"}, "engine": {"fuse": "auto"}}
        >>> raw |= {"task": {"kind": "causal-lm"}, "federation": {"clients": 3, "rounds": 1}}
        >>> raw |= {"lora": {"target_modules": ["q"]}, "data": {"name": "rows"}}
        >>> one, other, pooled = (
        ...     Recipe.model_validate({**raw, "method": {"name": name}})
        ...     for name in ("fedit", "fedex-keep", "centralized")
        ... )
        >>> in_common([one, pooled]), in_common([one, other, pooled])
        ({}, {'fuse': 1})
    """
    several = [r for r in recipes if r.federation.sampled > 1 and not r.method.chosen.pooled]
    found: dict[str, Any] = {}
    if any(r.engine.fuse == "auto" and r.fused == 1 for r in several):
        found["fuse"] = 1
    if any(r.engine.precision == "auto" and not r.autocasts for r in recipes):
        found["precision"] = "float32"
    return found


def settled(recipe: Recipe, engine: dict[str, Any]) -> dict[str, Any]:
    """Those of these values that the recipe leaves to be measured, and can have."""
    auto = {key: value for key, value in engine.items() if getattr(recipe.engine, key) == "auto"}
    return auto | ({"fuse": 1} if "fuse" in auto and recipe.fused == 1 else {})
