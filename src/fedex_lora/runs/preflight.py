"""What shows before a run's first round: what is wrong with its recipe, all of it at once, and
whether it has the room that it needs, on the disk and in memory.

Of room only what is certain counts, so that no run is refused that would have fitted. What a run is
likely to need, and how long it takes, `fedex_lora.runs.plan` works out.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.fits import rank_problems
from fedex_lora.engines.rows import load_rows
from fedex_lora.engines.setup import Federation, architecture_of, recipe_task
from fedex_lora.engines.training import training_problems
from fedex_lora.errors import StorageError, UserError
from fedex_lora.model.architectures import narrowest, plain_model, read_config
from fedex_lora.model.load import local_folder, pick_device
from fedex_lora.recipe import Problem, Recipe, limits
from fedex_lora.recipe.draft import Draft, Places
from fedex_lora.runs.plan.memory import (
    FLOAT32,
    ledger_numbers,
    own_numbers,
    server_memory,
    total,
    turn_memory,
)

KEPT = 4  # checkpoints at a time: the best, the two newest, and one that is being written
_KEY = re.compile(r"[a-z_]+(\.[A-Za-z_]+)+")


def check(recipe: Recipe) -> None:
    """Checks a recipe before a run, however it was made.

    Raises:
        UserError: One line for each problem.
    """
    raw = recipe.model_dump(exclude_unset=True)
    beforehand(Draft(raw, Places(""), recipe).checked(limits)).settled()


def beforehand(draft: Draft) -> Draft:
    """With what the Trainer says of its settings, and layers of ranks; if anything is wrong, with
    what is wrong with the rows as well.

    Rows take long to read, and are read and checked anyway before the model is loaded.
    """
    draft = draft.checked(lambda recipe: training_problems(recipe.training)).checked(_ranks)
    return draft.checked(_rows) if draft.lines else draft


def _ranks(recipe: Recipe) -> Iterator[Problem]:
    """Ranks above the sides of all layers that have them.

    The layers are only worked out where a rank is above a side that the model's config names.
    """
    lora = recipe.lora
    if METHODS[recipe.method.name].trains == "all":
        return
    try:
        task = recipe_task(recipe)
        config = read_config(recipe.model.name, recipe.model.revision, **task.model_kwargs())
        if max(lora.r, *(lora.ranks or []), *lora.rank_pattern.values(), 0) <= narrowest(config):
            return
        model = architecture_of(recipe, task)
    except UserError:  # not known here, or loading the model will tell what is wrong
        return
    clients = [str(i) for i, _ in enumerate(lora.ranks or [])]
    yield from rank_problems(lora, federation_settings(recipe, model, clients).layers)


def _rows(recipe: Recipe) -> Iterator[Problem]:
    """Whether the rows that are here are there, fit the task and suffice for the clients."""
    if elsewhere(recipe):
        return
    try:
        load_rows(recipe, recipe_task(recipe))
    except UserError as error:
        key, _, text = str(error).partition(": ")
        yield (key, text) if _KEY.fullmatch(key) else ("", str(error))


def elsewhere(recipe: Recipe) -> str:
    """Why rows cannot be read without a network; "" if they can."""
    further = [name for name in recipe.data.evaluation.values() if not Path(name).exists()]
    for name in (recipe.data.name, *further):
        if name is not None:
            return f"unknown without the rows: {name} is on the hub; local copies: data.path"
    return "" if recipe.engine.kind != "flower" else "unknown: the rows are the clients' own"


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
        task = recipe_task(recipe)
        config = read_config(recipe.model.name, recipe.model.revision, **task.model_kwargs())
        needed = plain_model(recipe.model.name, config, task.auto_model).bytes(recipe.model)
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
    ledger = FLOAT32 * ledger_numbers(settings)
    exchanged = FLOAT32 * (factors + head)
    checkpoint = ledger + exchanged
    theirs = settings.method.assignment.private and recipe.engine.kind != "local"
    own = 0 if theirs else FLOAT32 * own_numbers(settings, head)
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
