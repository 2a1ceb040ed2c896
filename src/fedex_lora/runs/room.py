"""Whether a run has the room it needs, on the disk and in memory: a formula of its settings.

Only what is certain counts: no estimates, so that no run is refused that would have fitted. What
a run is likely to need, and how long it takes, `fedex_lora.runs.plan` works out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.aggregator import assign
from fedex_lora.engines.setup import Federation, architecture_of, recipe_task
from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.settings import Settings
from fedex_lora.model.architectures import local_folder
from fedex_lora.model.load import pick_device
from fedex_lora.recipe import Recipe
from fedex_lora.runs.plan.memory import server_memory, total, turn_memory, weights
from fedex_lora.runs.plan.traffic import statistics

KEPT = 4  # checkpoints at a time: the best, the two newest, and one that is being written
_FLOAT32 = 4


def check_weights(recipe: Recipe) -> None:
    """Whether memory suffices for the model's weights, asked before it is loaded.

    The model is only built, as shapes, where its files are nearly too large, or not here yet.

    Raises:
        UserError: It does not. What else is wrong, loading the model will tell.
    """
    try:
        device = pick_device(recipe.model.device)
        folder = local_folder(recipe.model.name, recipe.model.revision)
        if folder is not None:
            stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            # a number takes a byte there at least
            if stored * getattr(torch, recipe.model.dtype).itemsize <= _free(device):
                return
        needed = weights(recipe, architecture_of(recipe, recipe_task(recipe)))
    except UserError:
        return
    _check_memory(needed, device, "the model's weights")


def check_room(federation: Federation, out: Path) -> None:
    """Whether disk and memory suffice for what comes once the model is loaded.

    Args:
        out: The run's directory, which need not be there yet.

    Raises:
        UserError: They do not.
    """
    recipe, settings, device = federation.recipe, federation.settings, federation.model.device
    head = sum(value.numel() for value in federation.initial.head.values())
    factors = sum(s.rank * (s.out + s.inp) for s in settings.layers.values())
    ledger = _FLOAT32 * ledger_numbers(settings)
    exchanged = _FLOAT32 * (factors + head)
    checkpoint = ledger + exchanged
    elsewhere = settings.method.assignment.private and recipe.engine.kind != "local"
    own = 0 if elsewhere else _FLOAT32 * own_numbers(settings, head)
    kept = min(KEPT, settings.rounds) * (checkpoint + own)
    if recipe.records.save_updates:  # every update, and what was made of them
        kept += settings.rounds * (settings.sample_size + 1) * exchanged
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if kept > free:
        raise StorageError(
            f"{out}: the run will write {_gb(kept)} or more, and {_gb(free)} are free there. A "
            f"checkpoint grows to {_gb(checkpoint)} within {settings.rounds} rounds, and up to "
            f"{KEPT} lie there at a time. Free some space, choose another `out`, or use fewer "
            "federation.rounds or a smaller lora.r"
        )
    server = total(server_memory(settings, head, checkpoint, 0), certain=True)
    turn = total(turn_memory(recipe, settings, head, ledger), certain=True)
    if recipe.engine.kind == "flower":  # clients train elsewhere
        turn = 0
    elif device.type == "cuda":
        _check_memory(turn, device, "what is trained")
        turn = 0
    _check_memory(server + turn, torch.device("cpu"), "what is trained, and what the server keeps")


def ledger_numbers(settings: Settings) -> int:
    """Numbers of the ledger where it is largest, at least: every round adds what the assignment
    leaves out, and all but the newest are one matrix a layer as soon as that is smaller."""
    each, dense = 0, 0
    for layer in settings.layers.values():
        if found := _left_out(settings, layer):
            each, dense = each + found, dense + layer.out * layer.inp
    largest = old = new = 0
    for _ in range(settings.rounds if each else 0):
        new += 1
        if new > 2 and dense <= old + (new - 1) * each:
            old, new = dense, 1
        largest = max(largest, old + new * each)
    return largest


def _left_out(settings: Settings, layer: LayerShape) -> int:
    """Numbers of a round's increment in one layer, of clients that start from B = 0 at least."""
    method = settings.method
    if not method.exchanges:
        return 0
    clients = 1 if settings.combining.mean == "krum" else settings.sample_size
    found = assign(method, statistics(settings, layer, 1, clients)).left_out
    if found is None or not method.in_ledger:
        return 0
    if method.residual == "truncated":
        rank = min(settings.rank or 0, found.rank)
        return min(rank * (layer.out + layer.inp), layer.out * layer.inp)
    return found.smaller().numbers


def own_numbers(settings: Settings, head: int) -> int:
    """Numbers that the clients of one round keep as their own."""
    assignment = settings.method.assignment
    taken = settings.sample(1)[: settings.sample_size]
    factors = sum(
        layer.rank * (("A" in assignment.own) * layer.inp + ("B" in assignment.own) * layer.out)
        for client in taken
        for layer in settings.layers_of(client).values()
    )
    return factors + len(taken) * head * assignment.head_private


def _check_memory(needed: int, device: torch.device, what: str) -> None:
    if needed > (free := _free(device)):
        where = "memory" if device.type != "cuda" else "the GPU's memory"
        raise StorageError(
            f"the run needs at least {_gb(needed)} of {where} for {what}, activations not counted, "
            f"and {_gb(free)} are available. Use a smaller model, model.dtype: bfloat16, "
            "model.quantisation, or a machine with more memory; `fedex-lora plan` lists the parts"
        )


def _free(device: torch.device) -> int:
    """Bytes of memory that are available there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gb(bytes: int) -> str:
    return f"{bytes / 1e9:.3g} GB"
