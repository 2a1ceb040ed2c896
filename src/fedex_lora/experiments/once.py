"""What several methods train in common is trained once.

In round 1 the clients of all methods that train the same factors leave from one start, with one
seed: they end in the same place, bit for bit. Methods differ in what they make of that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.turn import Train, Trained, Turn
from fedex_lora.federation.messages import flat
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.watch import Watcher


@dataclass
class Once:
    """Assembles runs whose first round takes over what an earlier one of them trained.

    Attributes:
        known: What trainings came to, by all that determines them.
    """

    known: dict[str, list[Trained]] = field(default_factory=dict)

    def __call__(
        self, recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
    ) -> tuple[Federation, Engine]:
        """As `in_this_process`."""
        federation, engine = in_this_process(recipe, out, clients, watcher)
        assert isinstance(engine, LocalEngine)
        shared = federation.recipe.model_dump(mode="json", exclude={"name", "method"})
        engine.train_with = Remembered(engine.train_with, json.dumps(shared), self.known)
        return federation, engine


@dataclass(frozen=True)
class Remembered:
    """A training that is asked for once: the first round's is looked up.

    Attributes:
        setting: All of the recipe that determines what is trained, as text.
        known: As in `Once`.
    """

    train: Train
    setting: str
    known: dict[str, list[Trained]]

    @property
    def together(self) -> int:
        return self.train.together

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        if turns[0].round > 1:  # the methods have parted
            return self.train(model, turns)
        key = sha256("\n".join([self.setting, *map(_start, turns)]).encode()).hexdigest()
        if key not in self.known:
            found = self.train(model, turns)
            self.known[key] = [
                replace(one, end=model.read()) if one.end is None else one for one in found
            ]
        return self.known[key]


def _start(turn: Turn) -> str:
    """The turn without its rows, which the recipe and the client's name determine."""
    digest = sha256()
    for name, value in sorted(flat(turn.start).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return f"{turn.client} {turn.seed} {sorted(turn.trained)} {digest.hexdigest()}"
