"""What is measured before round 1: `engine.fuse: auto` and `engine.precision: auto`.

Clients train in one pass, or in bfloat16, where this machine is faster so. A few steps are trained
both ways; the recipe that the run's directory keeps names what was chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedex_lora.engines.setup import Federation
from fedex_lora.runs.plan.timing import few_steps

WORTH = 1.1  # times as fast, or the memory and the rounding are not worth it


def settle_fuse(federation: Federation) -> tuple[Federation, str]:
    """The federation with its fusing decided, and what to say of it ("" if it was before).

    Returns:
        The federation, whose model's factors and head are changed if anything was measured.
    """
    recipe = federation.recipe
    if recipe.engine.fuse != "auto":
        return federation, ""
    apart, together = as_named(federation, fuse=1), as_named(federation, fuse=recipe.fused)
    if recipe.fused == 1:
        return apart, ""
    slow, fast = few_steps(apart), few_steps(together)
    chosen = together if fast * WORTH < slow else apart
    told = f"seconds a client's step: alone {slow:.3g}, {recipe.fused} in one pass {fast:.3g}"
    return chosen, f"fuse: {chosen.recipe.engine.fuse} ({told})"


def settle_precision(federation: Federation) -> tuple[Federation, str]:
    """The federation with its precision decided, and what to say of it; see `settle_fuse`."""
    if federation.recipe.engine.precision != "auto":
        return federation, ""
    whole, half = (as_named(federation, precision=name) for name in ("float32", "bfloat16"))
    slow, fast = few_steps(whole), few_steps(half)
    chosen = half if fast * WORTH < slow else whole
    told = f"seconds a step: float32 {slow:.3g}, bfloat16 {fast:.3g}"
    return chosen, f"precision: {chosen.recipe.engine.precision} ({told})"


def as_named(federation: Federation, **engine: Any) -> Federation:
    """The same with its recipe's block `engine` naming these values."""
    named = federation.recipe.engine.model_copy(update=engine)
    return replace(federation, recipe=federation.recipe.model_copy(update={"engine": named}))
