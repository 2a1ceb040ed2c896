"""`engine.precision: auto`: bfloat16 autocast where this machine trains faster with it."""

from __future__ import annotations

from dataclasses import replace

from fedex_lora.engines.setup import Federation
from fedex_lora.runs.plan.timing import few_steps

WORTH = 1.1  # times as fast as float32, or the rounding is not worth it


def settle(federation: Federation) -> tuple[Federation, str]:
    """The federation with its precision decided, and what to say of it ("" if it was before).

    Both precisions train a few steps of the client with the most rows; the recipe that the run's
    directory keeps has the one that was chosen.

    Returns:
        The federation, whose model's factors and head are changed if anything was measured.
    """
    recipe = federation.recipe
    if recipe.engine.precision != "auto":
        return federation, ""
    full, half = (few_steps(as_named(federation, name)) for name in ("float32", "bfloat16"))
    chosen = "bfloat16" if half * WORTH < full else "float32"
    told = f"precision: {chosen} (seconds a step: float32 {full:.3g}, bfloat16 {half:.3g})"
    return as_named(federation, chosen), told


def as_named(federation: Federation, precision: str) -> Federation:
    """The same with its recipe naming this precision."""
    engine = federation.recipe.engine.model_copy(update={"precision": precision})
    return replace(federation, recipe=federation.recipe.model_copy(update={"engine": engine}))
