"""Runs by hand for tests: the coordinator and its clients in one process, by folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_runs import SIZES

from fedex_lora.recipe import Recipe
from fedex_lora.runs.by_hand.closing import begin_run, close_round
from fedex_lora.runs.by_hand.opening import open_round
from fedex_lora.runs.by_hand.turning import take_turn
from fedex_lora.runs.rundir import RunDir


def by_hand(spec: Recipe, run: Path, data: Path, to: str | None = None) -> dict[str, Any]:
    """The whole run, every turn trained by `fedex-lora turn`; what results.json says."""
    begin_run(spec, run)
    results: dict[str, Any] = {}
    while not results:
        folders = open_round(run, to).folders
        for client, folder in folders.items():
            take_turn(folder, data / f"{client}.jsonl")
        results = close_round(run, list(folders.values()))
    return results


def state(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint of a run holds, by name."""
    newest = sorted((run / "checkpoints").glob("round-*.safetensors"))[-1]
    own = sorted((run / "checkpoints").glob("own/*.safetensors"))
    found = load_file(newest)
    return found | {f"{f.stem[-8:]}/{k}": v for f in own for k, v in load_file(f).items()}


def weights_used(run: Path) -> list[dict[str, float]]:
    return [record["weights"] for record in RunDir(run).records()]


ROWS = {name: size / sum(SIZES.values()) for name, size in SIZES.items()}
