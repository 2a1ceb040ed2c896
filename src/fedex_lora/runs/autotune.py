"""What is measured before round 1: `engine.fuse: auto` and `engine.precision: auto`.

Clients train in one pass, or in bfloat16, where this machine is faster so. A few steps are trained
both ways, once for a machine, a model and batches like these (`runs.remembered`); the recipe that
the run's directory keeps names what was chosen.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from fedex_lora.engines.setup import Federation
from fedex_lora.runs.plan.timing import few_steps, machine
from fedex_lora.runs.remembered import Seconds, path, remembered

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
    chosen, (slow, fast), before = _faster(apart, together)
    told = f"seconds a client's step: alone {slow:.3g}, {recipe.fused} in one pass {fast:.3g}"
    return chosen, f"fuse: {chosen.recipe.engine.fuse} ({told}{before})"


def settle_precision(federation: Federation) -> tuple[Federation, str]:
    """The federation with its precision decided, and what to say of it; see `settle_fuse`."""
    if federation.recipe.engine.precision != "auto":
        return federation, ""
    whole, half = (as_named(federation, precision=name) for name in ("float32", "bfloat16"))
    if not federation.recipe.autocasts or not _halves(federation.model.device):
        return whole, ""
    chosen, (slow, fast), before = _faster(whole, half)
    told = f"seconds a step: float32 {slow:.3g}, bfloat16 {fast:.3g}"
    return chosen, f"precision: {chosen.recipe.engine.precision} ({told}{before})"


def _faster(one: Federation, other: Federation) -> tuple[Federation, Seconds, str]:
    """The first, or the other where that is worth it; both ones' seconds; whether they were known.

    Another rank, method or partition of the same rows asks for the same choice, so that the runs
    of a comparison are alike.
    """
    what = {**_surroundings(one), "ways": [_way(one), _way(other)]}
    found, known = remembered(what, lambda: (few_steps(one), few_steps(other)))
    chosen = other if 0 < found[1] * WORTH < found[0] else one  # 0: lost in the noise
    return chosen, found, f"; as measured before, {path()}" if known else ""


def _halves(device: torch.device) -> bool:
    """Whether it computes in bfloat16, as the Trainer sees it."""
    return device.type == "cpu" or is_torch_bf16_gpu_available()


def _way(federation: Federation) -> list[Any]:
    return [federation.recipe.engine.precision, federation.recipe.fused]


def _surroundings(federation: Federation) -> dict[str, Any]:
    recipe, model = federation.recipe, federation.model
    lengths = [
        len(ids)
        for rows in federation.clients.values()
        if "input_ids" in rows.column_names
        for ids in rows["input_ids"]
    ]
    layers = Counter(f"{layer.out}x{layer.inp}" for layer in federation.settings.layers.values())
    sizes = ("per_device_train_batch_size", "gradient_checkpointing", "optim")
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    return {
        "machine": [machine(), gpu, transformers.__version__],
        "model": [str(value) for value in recipe.model.model_dump().values()],
        "layers": dict(layers),
        "length": 2 ** round(math.log2(sum(lengths) / len(lengths))) if lengths else 0,
        "task": recipe.task.kind,
        "training": [str(recipe.training.get(key)) for key in sizes],
    }


def as_named(federation: Federation, **engine: Any) -> Federation:
    """The same with its recipe's block `engine` naming these values."""
    return replace(federation, recipe=federation.recipe.with_engine(**engine))
