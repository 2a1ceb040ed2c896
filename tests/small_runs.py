"""Small real runs for tests: tiny models, three clients with a file each, unequal sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from tiny import ENCODERS, TEXT, tiny
from torch import Tensor

from fedex_lora.recipe import Recipe
from fedex_lora.runs.watch import Silent

LORA = {
    "roberta": {"target_modules": ["query", "value"]},
    "bert": {"target_modules": ["word_embeddings", "query"]},
    "gpt2": {"target_modules": ["c_attn"]},
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "gemma2": {"target_modules": ["k_proj", "up_proj"], "use_rslora": True},
}
SIZES = {"ann": 9, "bob": 3, "cleo": 5}


class StopAfter(Silent):
    """Interrupts a run as soon as a round is finished and saved."""

    def __init__(self, round: int) -> None:
        self.round = round

    def round_done(self, record: dict[str, Any]) -> None:
        if record["round"] == self.round:
            raise KeyboardInterrupt


def write_rows(folder: Path) -> list[Path]:
    """A file for each client, and validation and test rows for the server."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, size) in enumerate({**SIZES, "validation": 6, "test": 4}.items()):
        rows = [
            {"text": f"{TEXT[(i + j) % 4]} {j} {name}", "label": (i + j) % 3} for j in range(size)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return [folder / f"{name}.jsonl" for name in SIZES]


def recipe(folder: Path, kind: str = "roberta", **blocks: Any) -> Recipe:
    """A recipe for a tiny model in `folder`; `blocks` override single keys of its blocks."""
    model = folder / kind
    if not model.exists():
        tiny(kind, model, dtype=blocks.pop("model_dtype", torch.float32))
    text = {"kind": "causal-lm"}
    if kind in ENCODERS:
        text = {"kind": "text-classification", "labels": ["x", "y", "z"]}
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(model)},
        "lora": {"r": 3, "lora_alpha": 5, **LORA[kind]},
        "method": {"name": "fedex"},
        "federation": {"clients": 3, "rounds": 2},
        "task": {**text, "max_length": 32},
        "data": {"clients": write_rows(folder / "data"), "path": folder / "data"},
        "training": {
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
        },
    }
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block} if isinstance(block, Mapping) else block
    return Recipe.model_validate(raw)


def products(adapter: Path) -> dict[str, Tensor]:
    """s·B·A by site in float64, from the files of a PEFT adapter."""
    config = LoraConfig.from_pretrained(str(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A",) * 2):
            if key.endswith("." + first):
                second = second.replace("_A", "_B")
                site = key.removeprefix("base_model.model.").removesuffix("." + first)
                b = tensors[key.removesuffix(first) + second]
                found[site] = _scale(config, site, a.shape[0]) * b.double() @ a.double()
    return found


def _scale(config: LoraConfig, site: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), site), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def oracle(run: Path) -> dict[str, Tensor]:
    """G − W0 in float64, recomputed from the saved updates: Σ over rounds of Σ wᵢ(end − start)."""
    rounds = sorted((run / "rounds").iterdir())
    total = products(rounds[0] / "global")
    for before, now in pairwise(rounds):
        weights = json.loads((now / "global" / "weights.json").read_text())
        for client, weight in weights.items():
            own = before / "global" / "own" / client
            start = products(own if own.exists() else before / "global")
            end = products(now / "clients" / client)
            total = {s: t + weight * (end[s] - start[s]) for s, t in total.items()}
    return total
