"""What failures cost, in a real deployment on this machine: SuperLink with TLS and node keys, three
SuperNodes, a tiny model, two rounds a scenario, the failure in the first (the coordinator's in the
second).

    make chaos                                       # all scenarios
    python -m benchmarks.chaos "client hangs" ...    # some

For each: what was lost, how long the rounds took, and how far the final model is from the oracle:
the local engine's with the same participation. Results go to benchmarks/chaos.json, and the table
of all that stand there to docs/chaos.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines.deployed import Deployed, deployed
from engines.in_process import without, without_files
from small_runs import recipe as tiny_recipe

from fedex_lora.errors import UserError
from fedex_lora.flower.deploy.launch import launch
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.watch import Silent

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "chaos.json"
ROUND_TIMEOUT = 120.0
VICTIM = "bob"
TEXT = f"""# What failures cost

Written by `make chaos` (benchmarks/chaos.py), from benchmarks/chaos.json. A real deployment on one
machine: SuperLink with TLS and node keys, three SuperNodes, a tiny model, two rounds; the failure
happens in the first round to the client *bob*, or to the coordinator in the second, while *bob* is
at work. `round_timeout` is {ROUND_TIMEOUT:g} s. *Lost* is whose update in which round; *error* the
relative distance of the final state from that of the local engine with the same participation
(0: the same bits).
"""
SABOTAGE = {  # what the client does: what chaos_client calls it
    "client raises": "raises",
    "client process killed": "process killed",
    "client hangs": "hangs",
    "client sends NaN": "sends NaN",
    "client sends wrong shapes": "wrong shapes",
    "client sends 10 times the size": "10 times the size",
    "client sends another run's round": "another run's round",
}
# what is killed, and in which round: while the victim, who waits for it, is at work
KILLED = {"SuperNode killed": 1, "SuperLink killed": 1, "coordinator killed and resumed": 2}


class Stopped(Exception):
    """The coordinator's process was killed, and this one looks away."""


@dataclass
class Act(Silent):
    """Does `act` once, while the victim, who waits, is at work in the round of the scenario."""

    deployment: Deployed
    round: int
    act: Callable[[], object] | None
    stop: bool = False

    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None:
        act = self.act
        if act is not None and round == self.round:
            self.act = None
            self.deployment.await_at_work()
            act()
            self.deployment.let_go()
            if self.stop:
                raise Stopped


def main(chosen: list[str]) -> None:
    """Plays the scenarios, writes down what came of each, and the table."""
    scenarios = ["nothing fails", *SABOTAGE, *KILLED]
    unknown = sorted({*chosen} - {*scenarios})
    if unknown:
        sys.exit(f"no such scenario: {', '.join(unknown)}; there are: {', '.join(scenarios)}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        spec = tiny_recipe(folder, federation={"clients": 3, "rounds": 2})
        coordinator = _across(spec, folder)
        with deployed(folder / "deployment", coordinator, spec.data.clients or []) as deployment:
            for name in chosen or scenarios:
                out = folder / name.replace(" ", "-").replace("'", "")
                what, round = ("waits", KILLED[name]) if name in KILLED else (SABOTAGE.get(name), 1)
                try:
                    with deployment.sabotage(VICTIM, round, what or ""):
                        stopped = _play(name, coordinator, out, deployment)
                    if stopped:
                        launch(coordinator, out, deployment.folder, True, Silent())
                except UserError as error:
                    print(f"{name}: {error}\n{deployment.log(VICTIM)[-3000:]}", flush=True)
                    continue
                _keep(name, _outcome(spec, out, folder / f"{out.name}-oracle"))
    (ROOT / "docs" / "chaos.md").write_text(page(json.loads(RESULTS.read_text())))


def _play(name: str, coordinator: Recipe, out: Path, deployment: Deployed) -> bool:
    """Runs it to the end, or until the coordinator is killed; whether it was."""
    folder = deployment.folder
    acts: dict[str, Callable[[], object]] = {  # deploy client and server start them again
        "SuperNode killed": lambda: deployment.kill("", VICTIM),
        "SuperLink killed": lambda: deployment.kill("fedex_lora.flower.superlink", "server"),
        "coordinator killed and resumed": lambda: deployment.kill_app("server"),
    }
    resumed = name == "coordinator killed and resumed"
    watcher = Act(deployment, KILLED[name], acts[name], resumed) if name in acts else Silent()
    try:
        launch(coordinator, out, folder, False, watcher)
    except Stopped:
        return True
    return False


def _across(spec: Recipe, folder: Path) -> Recipe:
    raw = without_files(spec, folder / "data").model_dump()
    raw["engine"]["kind"] = "flower"
    raw["federation"].pop("partition")
    waits = {"round_timeout": ROUND_TIMEOUT, "wait_for_clients": 300.0, "min_clients": 1}
    raw["federation"] |= waits
    return Recipe.model_validate(raw)


def _outcome(spec: Recipe, out: Path, oracle: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    gone = {r["round"]: {**r["lost"], **r["refused"]} for r in records}
    return {
        "lost": gone,
        "seconds": [round(r["seconds"]["round"], 1) for r in records],
        "error": _error(spec, out, oracle, gone),
    }


def _keep(name: str, outcome: dict[str, Any]) -> None:
    print(f"{name}: {json.dumps(outcome)}", flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: outcome}, indent=1) + "\n")


def page(results: Mapping[str, Any]) -> str:
    """docs/chaos.md: the table of what was measured."""
    lines = [TEXT, "| scenario | lost | seconds by round | error |", "|---|---|---|---|"]
    for name in ("nothing fails", *SABOTAGE, *KILLED):
        if name in results:
            found = results[name]
            lost = [
                f"round {n}: {client} ({_cell(why)})"
                for n, who in found["lost"].items()
                for client, why in who.items()
            ]
            seconds = ", ".join(f"{s:.0f}" for s in found["seconds"])
            told = "; ".join(lost) or "nothing"
            lines.append(f"| {name} | {told} | {seconds} | {found['error']:.1g} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    short = text if len(text) < 100 else text[:97] + "..."
    return short.replace("|", "/")


def _error(spec: Recipe, out: Path, oracle: Path, gone: Mapping[int, Mapping[str, str]]) -> float:
    """Relative distance of the final state from the local engine's without the same clients."""
    start_run(spec, oracle, None, without(gone))
    got, expected = (load_file(d / "checkpoints" / "round-0002.safetensors") for d in (out, oracle))
    assert got.keys() == expected.keys()
    off = sum(float((got[n] - t).double().square().sum()) for n, t in expected.items())
    size = sum(float(t.double().square().sum()) for t in expected.values())
    return (off / size) ** 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
