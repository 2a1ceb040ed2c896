"""What failures cost, in a real deployment on this machine: SuperLink with TLS and node keys, three
SuperNodes, a tiny model, two rounds a scenario, the failure in the first.

    make chaos                                       # all scenarios, one table
    python -m benchmarks.chaos "client hangs" ...    # some

For each: what was lost, how long the rounds took, and how far the final model is from the oracle:
the local engine's with the same participation.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines.deployed import Deployed, deployed
from engines.in_process import without_files
from small_runs import recipe as tiny_recipe

from fedex_lora.deploy.launch import launch
from fedex_lora.federation.loop import Lost
from fedex_lora.federation.messages import Broadcast, Update
from fedex_lora.federation.state import ServerState
from fedex_lora.recipe import Recipe
from fedex_lora.run import Silent, in_this_process, start_run

ROUND_TIMEOUT = 150.0
VICTIM = "bob"
SABOTAGE = {  # what the client does: what chaos_client calls it
    "client raises": "raises",
    "client process killed": "process killed",
    "client hangs": "hangs",
    "client sends NaN": "sends NaN",
    "client sends wrong shapes": "wrong shapes",
    "client sends 10 times the size": "10 times the size",
    "client sends another run's round": "another run's round",
}


class Stopped(Exception):
    """The coordinator's process was killed, and this one looks away."""


@dataclass
class Act(Silent):
    """Does `act` once, when the first round's messages are out or when it is done."""

    act: Callable[[], object] | None = None
    when: str = "turn"
    stop: bool = False

    def turn(self, round: int, client: str, done: int, total: int) -> None:
        if self.when == "turn":
            self._do()

    def round_done(self, record: dict[str, Any]) -> None:
        if self.when == "round_done":
            self._do()

    def _do(self) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()
            if self.stop:
                raise Stopped


def main(chosen: list[str]) -> None:
    """Plays the scenarios and prints the table."""
    scenarios = [*SABOTAGE, "SuperNode killed", "SuperLink killed", "coordinator killed"]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        spec = tiny_recipe(folder, federation={"clients": 3, "rounds": 2})
        coordinator = _across(spec, folder)
        plan = folder / "plan.json"
        os.environ["FEDEX_LORA_CHAOS"] = str(plan)
        root = Path(__file__).resolve().parents[1]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        _plan(plan, "")
        print(f"{'scenario':34} {'lost':28} {'seconds by round':18} error", flush=True)
        with deployed(folder / "deployment", coordinator, spec.data.clients or []) as deployment:
            app = deployment.folder / "app" / "pyproject.toml"
            ours, theirs = "fedex_lora.flower.client_app:app", "benchmarks.chaos_client:app"
            app.write_text(app.read_text().replace(ours, theirs))
            for name in chosen or scenarios:
                out = folder / name.replace(" ", "-").replace("'", "")
                _plan(plan, SABOTAGE.get(name, ""))
                _play(name, coordinator, out, deployment)
                _report(name, spec, out, folder / f"{out.name}-oracle")


def _play(name: str, coordinator: Recipe, out: Path, deployment: Deployed) -> None:
    folder = deployment.folder
    if name == "SuperNode killed":  # deploy client starts it again
        launch(coordinator, out, folder, False, Act(lambda: deployment.kill("", VICTIM)))
        return
    if name == "SuperLink killed":  # deploy server starts it again
        act = Act(lambda: deployment.kill("fedex_lora.flower.superlink", "server"))
        launch(coordinator, out, folder, False, act)
        return
    if name == "coordinator killed":
        act = Act(lambda: deployment.kill("flwr-serverapp", "server"), "round_done", True)
        try:
            launch(coordinator, out, folder, False, act)
        except Stopped:
            launch(coordinator, out, folder, True, Silent())
        return
    launch(coordinator, out, folder, False, Silent())


def _across(spec: Recipe, folder: Path) -> Recipe:
    raw = without_files(spec, folder / "data").model_dump()
    raw["engine"]["kind"] = "flower"
    raw["federation"].pop("partition")
    waits = {"round_timeout": ROUND_TIMEOUT, "wait_for_clients": 300.0, "min_clients": 1}
    raw["federation"] |= waits
    return Recipe.model_validate(raw)


def _plan(file: Path, what: str) -> None:
    file.write_text(json.dumps({"client": VICTIM, "round": 1, "what": what}))


def _report(name: str, spec: Recipe, out: Path, oracle: Path) -> None:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    gone = {r["round"]: {**r["lost"], **r["refused"]} for r in records}
    lost = "; ".join(f"round {n}: {', '.join(who)}" for n, who in gone.items() if who) or "nothing"
    seconds = ", ".join(f"{r['seconds']['round']:.0f}" for r in records)
    print(f"{name:34} {lost:28} {seconds:18} {_error(spec, out, oracle, gone):.1e}", flush=True)
    for who in gone.values():
        for client, why in who.items():
            print(f"    {client}: {why[:120]}", flush=True)


def _error(spec: Recipe, out: Path, oracle: Path, gone: Mapping[int, Mapping[str, str]]) -> float:
    """Relative distance of the final state from the local engine's without the same clients."""

    def assemble(*arguments: Any) -> Any:
        federation, engine = in_this_process(*arguments)
        exchange = engine.exchange

        def without(
            state: ServerState, broadcasts: Mapping[str, Broadcast]
        ) -> Iterator[Update | Lost]:
            absent = gone.get(state.version + 1, {})
            yield from exchange(state, {c: b for c, b in broadcasts.items() if c not in absent})
            yield from (Lost(client, "absent in the real run too") for client in absent)

        engine.exchange = without  # type: ignore[method-assign]
        return federation, engine

    start_run(spec, oracle, None, assemble)
    got, expected = (load_file(d / "checkpoints" / "round-0002.safetensors") for d in (out, oracle))
    assert got.keys() == expected.keys()
    off = sum(float((got[n] - t).double().square().sum()) for n, t in expected.items())
    size = sum(float(t.double().square().sum()) for t in expected.values())
    return (off / size) ** 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
