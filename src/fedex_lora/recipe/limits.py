"""What no recipe can mean: numbers that are none, trainings without steps or without end, names
that are no names. Recipes of runs that were begun are not held to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedex_lora.recipe.federation import CLIENT_NAME, CLIENT_NAME_RULE
from fedex_lora.recipe.part import Problem
from fedex_lora.recipe.whole import Recipe

MOST = {  # by key
    "lora.r": 2**16,
    "lora.ranks": 2**16,
    "lora.rank_pattern": 2**16,
    "lora.lora_alpha": 10**6,
    "lora.alpha_pattern": 10**6,
    "method.rank": 2**16,
    "federation.clients": 10**6,
    "federation.rounds": 10**6,
    "federation.server_learning_rate": 1000,
    "federation.partition.shards_per_client": 10**6,
    "task.max_length": 10**7,
    "task.evaluation_max_length": 10**7,
    "evaluation.batch_size": 10**6,
    "engine.client_cpus": 2**16,
}
SECONDS = 10**9  # some thirty years: what a clock can wait for


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, perhaps without the ends."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value <= self.most and math.isfinite(value)
        end = (self.above and value == self.least) or (self.below and value == self.most)
        return inside and not end and (isinstance(value, int) or not self.whole)

    def __str__(self) -> str:
        """
        Example:
            >>> str(Range(0, above=True)), str(Range(1, 9, whole=True))
            ('a number above 0', 'a whole number of at least 1 and at most 9')
        """
        text = f"a {'whole ' if self.whole else ''}number "
        text += f"{'above' if self.above else 'of at least'} {self.least}"
        most = f" and {'below' if self.below else 'at most'} {self.most}"
        return text + (most if math.isfinite(self.most) else "")


TRAINING: Mapping[str, Range] = {  # the Trainer checks the rest
    "learning_rate": Range(0, above=True),
    "num_train_epochs": Range(0, 10**6, above=True),
    "per_device_train_batch_size": Range(1, 10**6, whole=True),
    "gradient_accumulation_steps": Range(1, 10**6, whole=True),
    "weight_decay": Range(0),
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": Range(0),
    "max_grad_norm": Range(0),
    "warmup_steps": Range(0, 10**9),
    "warmup_ratio": Range(0, 1),
    "label_smoothing_factor": Range(0, 1, below=True),
    "neftune_noise_alpha": Range(0),
    "logging_steps": Range(0, 10**9, above=True),
    "dataloader_num_workers": Range(0, 10**3, whole=True),
}
_STEPS = Range(1, 10**9, whole=True)  # of one client in one round


def limits(recipe: Recipe) -> Iterator[Problem]:
    """The dotted key of every value that no run can have, and what is wrong with it.

    Example:
        >>> raw = {"name": "x", "model": {"name": "m"}, "task": {"kind": "causal-lm"}}
        >>> raw |= {"data": {"path": "d"}, "training": {"num_train_epochs": 0}}
        >>> list(limits(Recipe.model_validate(raw)))
        [('training.num_train_epochs', 'expected a number above 0 and at most 1000000, got 0')]
    """
    values = recipe.model_dump()
    for key, value in _numbers(values):
        block = next((known for known in MOST if f"{key}.".startswith(f"{known}.")), "")
        if isinstance(value, float) and not math.isfinite(value):
            yield key, f"expected a number that is finite, got {value}"
        elif block and value > MOST[block]:
            yield key, f"expected at most {MOST[block]}, got {value}"
    for key in ("round_timeout", "wait_for_clients"):
        if SECONDS < values["federation"][key] < math.inf:
            yield f"federation.{key}", f"expected at most {SECONDS} seconds"
    for key, value in recipe.training.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if key == "max_steps" and value != -1 and value not in _STEPS:
            text = f"expected {_STEPS}, or -1 (as many as there are epochs), got {value}"
            yield "training.max_steps", text
        elif key in TRAINING and value not in TRAINING[key]:
            yield f"training.{key}", f"expected {TRAINING[key]}, got {value}"
    yield from _names(recipe)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a recipe but those of the Trainer, by dotted key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if (key, name) != ("", "training"):
                yield from _numbers(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _names(recipe: Recipe) -> Iterator[Problem]:
    """Files give clients their names, which become folders' names."""
    names = [name for name, _ in recipe.data.files()]
    for name in names:
        if not CLIENT_NAME.fullmatch(name):
            yield (
                "data.clients",
                f"{name!r}: a file's name is its client's, {CLIENT_NAME_RULE}; rename the file",
            )
    for key, given in (("data.clients", names), ("federation.names", recipe.federation.names)):
        first: dict[str, str] = {}
        for name in given or []:
            other = first.setdefault(name.casefold(), name)
            if other != name:
                yield key, f"{other!r} and {name!r} differ in capitals alone; rename one of them"
