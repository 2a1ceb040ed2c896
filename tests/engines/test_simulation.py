"""Flower's simulation on this machine: the local engine's bits, and nothing left running."""

import tempfile
import time
from pathlib import Path

import pytest
from small_runs import recipe

from engines.deployed import command
from engines.test_wire import CLIENTS, same_bits, timeless
from fedex_lora.flower.deploy.launch import simulate
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.watch import Silent

pytestmark = pytest.mark.deployment


def begun_from(folder: Path) -> list[str]:
    """Commands of the processes whose environment names something in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            here = f"FLWR_HOME={folder}".encode() in entry.read_bytes()
        except OSError:  # it ended, or is another user's
            continue
        if here:
            found.append(command(int(entry.parent.name)))
    return found


def test_a_simulation_is_the_local_run_and_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 2}, evaluation=CLIENTS)
    raw = spec.model_dump()
    raw["engine"]["kind"] = "flower-simulation"
    raw["federation"].pop("partition")
    raw["federation"] |= {"round_timeout": 300.0, "wait_for_clients": 300.0, "min_clients": 3}
    seen = []

    class Looks(Silent):
        def round_done(self, record):
            seen.extend(begun_from(tmp_path))

    simulate(Recipe.model_validate(raw), tmp_path / "run", False, Looks())
    assert any("ray" in one for one in seen)  # it is seen while it runs
    until = time.monotonic() + 20
    while (left := begun_from(tmp_path)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not left
    start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    assert timeless(tmp_path / "local") == timeless(tmp_path / "run")
