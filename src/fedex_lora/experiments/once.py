"""What several methods train in common is trained once.

In round 1 the clients of all methods that train the same factors leave from one start, with one
seed: they end in the same place, bit for bit. Methods differ in what they make of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.disk import replace_atomic
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.turn import Train, Trained, Turn
from fedex_lora.federation.messages import flat, replaced
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.watch import Watcher

FOLDER = "first-rounds"  # beside the runs that share them
# what becomes of updates at the server, which no first round's training knows of
_AFTERWARDS = {"weights", "mean", "liars", "align", "min_clients"}
_AFTERWARDS |= {"server_optimizer", "server_learning_rate"}


@dataclass(frozen=True)
class Once:
    """Assembles runs whose first round takes over what another one of them trained.

    Attributes:
        folder: Where that is kept, a file for each training.
    """

    folder: Path

    def __call__(
        self, recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
    ) -> tuple[Federation, Engine]:
        """As `in_this_process`."""
        federation, engine = in_this_process(recipe, out, clients, watcher)
        assert isinstance(engine, LocalEngine)
        others = {"name": True, "method": True, "federation": _AFTERWARDS}
        shared = federation.recipe.model_dump(mode="json", exclude=others)
        engine.train_with = Remembered(engine.train_with, json.dumps(shared), self.folder)
        return federation, engine


@dataclass(frozen=True)
class Remembered:
    """A training that is asked for once: the first round's is looked up.

    Attributes:
        setting: All of the recipe that determines what is trained, as text.
        folder: As in `Once`.
    """

    train: Train
    setting: str
    folder: Path

    @property
    def together(self) -> int:
        return self.train.together

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        if turns[0].round > 1:  # the methods have parted
            return self.train(model, turns)
        numerics = f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}"
        key = sha256("\n".join([numerics, self.setting, *map(_start, turns)]).encode())
        path = self.folder / f"{key.hexdigest()}.safetensors"
        with suppress(OSError, SafetensorError):  # there is none, or none that can be read
            return _read(path, turns)
        found = self.train(model, turns)
        ends = [model.read() if one.end is None else one.end for one in found]
        if all(flat(t.start).keys() == flat(end).keys() for t, end in zip(turns, ends)):
            _write(path, [one.metrics for one in found], ends)
        return [replace(one, end=end) for one, end in zip(found, ends)]


def _start(turn: Turn) -> str:
    """The turn without its rows, which the recipe and the client's name determine."""
    digest = sha256()
    for name, value in sorted(flat(turn.start).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    what = (turn.client, turn.seed, sorted(turn.trained), turn.pruning, turn.head)
    return f"{what} {digest.hexdigest()}"


def _write(
    path: Path, metrics: Sequence[Mapping[str, float]], ends: Sequence[AdapterState]
) -> None:
    tensors = {
        f"{i} {name}": value.detach().cpu().contiguous()
        for i, end in enumerate(ends)
        for name, value in flat(end).items()
    }
    told = {"metrics": json.dumps([dict(one) for one in metrics])}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomic(path, lambda new: save_file(tensors, new, told))


def _read(path: Path, turns: Sequence[Turn]) -> list[Trained]:
    with safe_open(path, "pt") as file:
        metrics = json.loads(file.metadata()["metrics"])
        ends = [
            {n: file.get_tensor(f"{i} {n}") for n in flat(t.start)} for i, t in enumerate(turns)
        ]
    given = zip(metrics, turns, ends, strict=True)
    return [Trained(told, replaced(turn.start, end)) for told, turn, end in given]
