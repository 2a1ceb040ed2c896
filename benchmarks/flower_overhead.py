"""What a round across machines costs beside training, against Flower's own floor.

    python -m benchmarks.flower_overhead floor    # small messages
    python -m benchmarks.flower_overhead large    # 200 MB of adapter and ledger for every client
    python -m benchmarks.flower_page              # what was measured, into docs/deploy.md

On this machine, over TLS and with node keys, three SuperNodes. The floor is a Flower app on the
same SuperLink that sends and returns as many bytes and does nothing; the two take turns, so that
what else the machine does hits both. Results go to benchmarks/flower.json.

Flower cuts messages into pieces of 5 MiB and carries equal ones once. So that its count can be
compared with ours no piece here is equal to another: clients take two steps, for in the first one
B = 0 and A does not move.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines.deployed import Deployed, deployed, traffic
from engines.in_process import remote, without_files
from small_runs import recipe as small_recipe
from tiny import tiny

from fedex_lora.flower.deploy.launch import launch, start
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.watch import Silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "flower.json"
NODES = 3
WIDTH, LAYERS, RANK, ROUNDS = 1024, 4, 1024, 3
TURNS = 2  # of ours and Flower's
SITES = ["query", "key", "value", "attention.output.dense"]

ECHO = """
[tool.flwr.app]
publisher = "fedex-lora"

[tool.flwr.app.components]
serverapp = "benchmarks.flower_echo:server"
clientapp = "benchmarks.chaos_client:app"

[tool.flwr.app.config]
down = 0
up = 0
nodes = 0
rounds = 0
result = ""
"""


def main(part: str) -> None:
    """Measures one part, and adds it to the results."""
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="overhead-") as temporary:
        for name, found in {"floor": floor, "large": large}[part](Path(temporary)):
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            load = round(os.getloadavg()[1], 1)  # what else the machine does is in it
            where = {
                "date": f"{date.today()}",
                "cores": os.cpu_count(),
                "nodes": NODES,
                "load": load,
            }
            known[part] = {**known.get(part, {}), name: found, **where}
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            print(name, json.dumps(found, indent=1), flush=True)


def floor(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rounds of a tiny model, whose training takes no time, and rounds of nothing."""
    spec = across(small_recipe(folder, federation={"clients": NODES, "rounds": 6}), folder)
    with deployed(folder / "deployment", spec, files(folder)) as deployment:
        yield from in_turn(deployment, spec, folder)


def large(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rounds with large adapters, and rounds of blobs as large as in the last of them."""
    wide = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    tiny("roberta", folder / "roberta", **wide)
    base = small_recipe(
        folder,
        lora={"target_modules": SITES, "r": RANK, "lora_alpha": RANK},
        federation={"clients": NODES, "rounds": ROUNDS},
        training={"max_steps": 2, "per_device_train_batch_size": 1},
    )
    spec = across(base, folder)
    with deployed(folder / "deployment", spec, files(folder)) as deployment:
        yield from in_turn(deployment, spec, folder)


def in_turn(
    deployment: Deployed, spec: Recipe, folder: Path
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Our runs and Flower's, whose messages are as large as those of our last round."""
    ours, flowers = [], []
    for turn in range(TURNS):
        ours.append(run(deployment, spec, folder / f"run-{turn}"))
        down, up = (ours[-1][key][-1] // NODES for key in ("bytes_down", "bytes_up"))
        seconds = echo(deployment, down, up, spec.federation.rounds, folder / f"echo-{turn}")
        flowers.append({"down": down, "up": up, "seconds": seconds})
        yield "ours", ours
        yield "flower", flowers


class Shown(Silent):
    """Says when a round is over."""

    def round_done(self, record: dict[str, Any]) -> None:
        print(record["round"], record["seconds"], file=sys.stderr, flush=True)


def files(folder: Path) -> list[Path]:
    return [folder / "data" / f"{name}.jsonl" for name in ("ann", "bob", "cleo")]


def across(spec: Recipe, folder: Path) -> Recipe:
    return remote(without_files(spec, folder / "data"), wait_for_clients=300.0, round_timeout=300.0)


def run(deployment: Deployed, spec: Recipe, out: Path) -> dict[str, Any]:
    """Seconds of every round and of the longest training in it; bytes, by us and by Flower."""
    (deployment.folder / "recipe.yaml").write_text(dump_recipe(spec))  # read for every message
    launch(spec, out, deployment.folder, False, Shown())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    return {
        "seconds": [r["seconds"]["round"] for r in records],
        "training": [max(c["seconds"] for c in r["clients"].values()) for r in records],
        "bytes_down": [sum(r["bytes_down"].values()) for r in records],
        "bytes_up": [sum(r["bytes_up"].values()) for r in records],
        "bytes": results["bytes_up"] + results["bytes_down"],
        "bytes_by_flower": traffic(deployment.folder),
    }


def echo(deployment: Deployed, down: int, up: int, rounds: int, folder: Path) -> list[float]:
    """Seconds of rounds of the app that does nothing; its files go to `folder`."""
    (folder / "app").mkdir(parents=True)
    project = (deployment.folder / "app" / "pyproject.toml").read_text()
    (folder / "app" / "pyproject.toml").write_text(
        re.split(r"\n\[tool\.flwr\.app\]", project)[0] + ECHO
    )
    for name in ("flower", "server"):  # the connection, and the secret
        (folder / name).symlink_to(deployment.folder / name)
    values: Mapping[str, Any] = {
        "down": down, "up": up, "nodes": NODES, "rounds": rounds, "result": str(folder / "result"),
    }  # fmt: skip
    config = folder / "config.toml"
    config.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    start(folder, config)
    until = time.monotonic() + 300
    while not (folder / "result").exists():
        assert time.monotonic() < until, deployment.log("server")[-3000:]
        time.sleep(0.5)
    time.sleep(2)  # written, and the run over
    return json.loads((folder / "result").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
