"""Run directories with numbers of one's choice, for tests of what reads runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe

SITES = {f"m.layer.{i}.{kind}": None for i in range(4) for kind in ("query", "value")}
CLIENTS = {"ann": 60, "bob": 30, "cleo": 10}


def spec(method: str = "fedex", /, seed: int = 0, **blocks: Any) -> Recipe:
    """A recipe of GLUE's SST-2; `blocks` override single keys of its blocks."""
    raw: dict[str, Any] = {
        "name": "made-up",
        "seed": seed,
        "model": {"name": "some/model"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
        "method": {"name": method},
        "federation": {"clients": 3, "rounds": 3},
        "task": {"kind": "glue", "name": "sst2"},
        "data": {"path": "rows"},
        "training": {"num_train_epochs": 3},
    }
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block} if isinstance(block, Mapping) else block
    return Recipe.model_validate(raw)


def deviation(site: str, round: int) -> float:
    """Falls with depth and over rounds, and is larger in Q: as the paper says."""
    layer = int(site.split(".")[2])
    return (2.0 if site.endswith("query") else 1.0) / (1 + layer) / round


def record(
    recipe: Recipe, round: int, score: float | None, down: int = 100, by_site: Any = deviation
) -> dict[str, Any]:
    method = METHODS[recipe.method.name]
    names = ["all"] if method.pooled else list(CLIENTS)
    found: dict[str, Any] = {
        "round": round,
        "clients": {
            n: {"examples": CLIENTS.get(n, 100), "loss": 1 / round, "steps": 3.0} for n in names
        },
        "refused": {},
        "lost": {},
        "weights": dict.fromkeys(names, 1 / len(names)),
        "bytes_down": dict.fromkeys(names, down),
        "bytes_up": dict.fromkeys(names, 100),
        "seconds": {"round": 1.0},
        "scores": {"validation": {"accuracy": score, "loss": 0.5}},
        "score": score,
    }
    if method.trains == "both" and method.exchanges and not method.pooled:
        layers = {site: by_site(site, round) for site in SITES}
        found |= {"deviation": 1.0, "ideal": 10.0, "deviation_by_site": layers}
        found["ideal_by_site"] = dict.fromkeys(SITES, 10.0)
    if method.residual == "truncated":  # a part of what is missed that falls with the rank
        whole = sum(v**2 for v in found["deviation_by_site"].values()) ** 0.5
        last = recipe.method.flush and round == recipe.federation.rounds
        found["left_out"] = 0.0 if last else whole / (1 + (recipe.method.rank or 0))
    return found


def results(recipe: Recipe, test: float, rounds: int, down: int, rows: int) -> dict[str, Any]:
    scores = {"validation": {"accuracy": test, "loss": 0.5}, "test": {"accuracy": test}}
    return {
        "method": recipe.method.name,
        "seed": recipe.seed,
        "metric": "accuracy",
        "rounds": rounds,
        "best_round": rounds,
        "last": {"scores": scores, "score": test},
        "best": {"scores": scores, "score": test},
        "description": f"rows, train: {rows} rows, validation: 10 rows, test: 20 rows",
        "deviation": 0.5,
        "bytes_up": 300 * rounds,
        "bytes_down": 3 * down * (rounds + 1),
        "bytes_delivery": 3 * down,
        "seconds": 3.0,
    }


def made_up(
    folder: Path,
    recipe: Recipe,
    test: float | None = 0.8,
    *,
    rounds: Sequence[int] = (1, 2, 3),
    down: int = 100,
    rows: int = 100,
    by_site: Any = deviation,
    client_scores: Mapping[str, float] | None = None,
) -> Path:
    """Writes a run into `folder`; with `test` None it is not finished.

    Args:
        rounds: Those that have a record.
        down: Bytes to each client in each round.
        rows: Of the training data, in its description.
        by_site: (site, round) → deviation.
    """
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "threads": 1}))
    found = [record(recipe, r, 0.5 + 0.01 * r, down, by_site) for r in rounds]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    if test is not None:
        said = results(recipe, test, len(rounds), down, rows)
        if client_scores:
            own = {name: {"accuracy": value} for name, value in client_scores.items()}
            said["best"]["client_scores"] = own
        (folder / "results.json").write_text(json.dumps(said))
    return folder


def grid(folder: Path, scores: Mapping[str, Sequence[float]], **blocks: Any) -> Path:
    """A run a method and seed: `scores` has the test scores by method, in the order of seeds."""
    for method, values in scores.items():
        for seed, value in enumerate(values):
            name = f"{method}-seed{seed}" + "".join(f"-{v}" for v in blocks.values())
            one = spec(method, seed, **blocks)
            down = 150 if METHODS[method].residual == "exact" else 100
            made_up(folder / name.replace(" ", ""), one, value, down=down)
    return folder
