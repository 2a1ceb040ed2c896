"""`engine.fuse: auto`: clients train in one pass where this machine is faster so."""

from __future__ import annotations

from dataclasses import replace

from fedex_lora.engines.setup import Federation
from fedex_lora.runs.plan.timing import few_steps

WORTH = 1.1  # times as fast as one after the other, or the memory is not worth it


def settle_fuse(federation: Federation) -> tuple[Federation, str]:
    """The federation with its fusing decided, and what to say of it ("" if it was before).

    A few steps are trained both ways; the recipe that the run's directory keeps has the number
    that was chosen.

    Returns:
        The federation, whose model's factors and head are changed if anything was measured.
    """
    recipe = federation.recipe
    if recipe.engine.fuse != "auto":
        return federation, ""
    apart, together = as_fused(federation, 1), as_fused(federation, recipe.fused)
    if recipe.fused == 1:
        return apart, ""
    slow, fast = few_steps(apart), few_steps(together)
    chosen = together if fast * WORTH < slow else apart
    told = f"seconds a client's step: alone {slow:.3g}, {recipe.fused} in one pass {fast:.3g}"
    return chosen, f"fuse: {chosen.recipe.engine.fuse} ({told})"


def as_fused(federation: Federation, clients: int) -> Federation:
    """The same with its recipe naming so many clients."""
    engine = federation.recipe.engine.model_copy(update={"fuse": clients})
    return replace(federation, recipe=federation.recipe.model_copy(update={"engine": engine}))
