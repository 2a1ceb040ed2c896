"""What is said across machines besides tensors: who speaks, about which run, and what must agree.

Every message is one safetensors blob (`federation.codec`) with a JSON object `about` in its header.
Requests are of kind hello, round, secure, evaluate, final or refused; replies of kind hello, unfit,
undecided, update, secure, lacks, scores, failed. Nothing of it is ever used as a path, as a format
or as code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.digests import tensors_digest, tokenizer_digest
from fedex_lora.federation.codec import most_up
from fedex_lora.federation.header import Limit
from fedex_lora.federation.messages import flat
from fedex_lora.federation.settings import Settings
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.tasks import Task

PROTOCOL = 4
NOTHING = -1  # the version of a client that lost even its own factors

Lineage = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Identity:
    """Which federation, and which of its histories.

    Attributes:
        federation: 32 hex digits, drawn when the run began.
        lineage: (version, mark) for every time the coordinator started: what came after `version`
            under an earlier mark was thrown away.
    """

    federation: str
    lineage: Lineage

    def holds(self, version: int, mark: str) -> bool:
        """Whether what somebody received as `version` under `mark` is part of this history.

        Example:
            >>> identity = Identity("f", ((0, "a"), (3, "b")))
            >>> identity.holds(3, "a"), identity.holds(4, "a"), identity.holds(4, "b")
            (True, False, True)
        """
        marks = [m for _, m in self.lineage]
        if mark not in marks:
            return False
        later = self.lineage[marks.index(mark) + 1 :]
        return all(version <= start for start, _ in later)


@dataclass(frozen=True)
class Facts:
    """What coordinator and clients must have in common.

    Attributes:
        agreed: Fields of the recipe, by dotted name, and the label set.
        digests: Of the pretrained weights, the tokenizer, and the initial adapter and head.
    """

    agreed: Mapping[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)

    def differences(self, theirs: Facts) -> list[str]:
        """What differs, in words; here first."""
        found = []
        for name in sorted({*self.agreed, *theirs.agreed}):
            mine, other = self.agreed.get(name), theirs.agreed.get(name)
            if mine != other:
                found.append(f"{name}: {mine!r} here, {other!r} at the coordinator")
        for name, mine in self.digests.items():
            other = theirs.digests.get(name)
            if mine != other:
                found.append(f"{_WHAT[name]} (digest {mine[:12]} here, {str(other)[:12]} there)")
        return found


_WHAT = {
    "weights": "model.name: other pretrained weights; take the same revision",
    "tokenizer": "model.name: another tokenizer; take the same revision",
    "initial": "the seeded initial adapter or head came out differently; take the same torch",
}


def facts(recipe: Recipe, task: Task, model: AdaptedModel, initial: AdapterState) -> Facts:
    """Those of one party; `initial` as `AdaptedModel.initial` gave it."""
    digests = {
        "weights": tensors_digest(model.frozen()),
        "tokenizer": tokenizer_digest(model.tokenizer),
        "initial": tensors_digest(flat(initial)),
    }
    return Facts(agreed(recipe, task), digests)


def agreed(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The fields of a recipe that must be equal everywhere, by dotted name.

    Where files lie, how many threads are used and how rounds are run is everybody's own.
    """
    raw = recipe.model_dump(mode="json")
    parts = {
        "seed": raw["seed"],
        "model": _only(raw["model"], "dtype", "placement", "quantisation"),
        "lora": {k: v for k, v in raw["lora"].items() if k != "init"},
        "method": raw["method"],
        "task": raw["task"],
        "training": raw["training"],
        "federation": _only(raw["federation"], "rounds", "wire_dtype"),
        "evaluation": _only(raw["evaluation"], "where", "client_fraction", "batch_size"),
        "data": _only(raw["data"], "train_examples"),
        "privacy": raw["privacy"],
        "labels": list(task.labels or ()),
    }
    if recipe.federation.scaffold:
        parts["federation"]["scaffold"] = True
    if recipe.privacy.secure_aggregation is not None:  # of which clients do their part themselves
        names = ("clients", "clients_per_round", "weights", "server_learning_rate", "max_norm")
        parts["federation"] |= _only(raw["federation"], *names)
    return dict(_dotted(json.loads(json.dumps(parts))))


def agreement(facts: Mapping[str, Any]) -> str:
    """A digest of what is agreed, for every message after the first."""
    return _digest_text(json.dumps(facts, sort_keys=True))


def most_down(settings: Settings, initial: AdapterState) -> Limit:
    """The limit of a broadcast: twice the dense layers (a ledger is compacted when it is larger
    than those) and the adapter. How many entries a ledger has is open, so a header may be long."""
    dense = sum(s.out * s.inp for s in settings.layers.values())
    most = most_up(initial)
    whole = 8 * dense + 2 * most.whole
    return Limit(header=most.header + (1 << 20) + whole // 4, whole=whole + (1 << 20))


def _only(block: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: block[name] for name in names}


def _dotted(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _dotted(part, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
