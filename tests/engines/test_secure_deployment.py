"""Sums over real processes: TLS, node keys, signatures, sealed secrets. Minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from small_runs import SIZES, recipe

from engines.deployed import deployed
from engines.in_process import remote, without_files
from engines.test_secure_messages import secured
from engines.test_wire import same_bits
from fedex_lora.flower.deploy.launch import launch, simulate
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

pytestmark = pytest.mark.deployment


FEDERATION = {"clients": 3, "rounds": 2, "weights": "uniform"}
BY_CLIENT = {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3, "adaptive": True}
BY_ROW = {"noise_multiplier": 0.8, "delta": 1e-2}
NOISED: dict[str, dict[str, Any]] = {
    "on a sum, with a bound that follows the norms": {
        "method": {"name": "ffa"},
        "privacy": {"client_level": BY_CLIENT},
    },
    "in training": {
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "privacy": {"example_level": BY_ROW},
    },
}


def test_sums_of_real_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """Of rehearsals, whose noise and draws repeat. A client's recipe is read anew for every
    message, so all are run in one deployment."""
    specs = {}
    for name, given in NOISED.items():
        privacy = {**given["privacy"], "secure_aggregation": True, "rehearsal": True}
        blocks = {"federation": FEDERATION, **given, "privacy": privacy}
        specs[name] = recipe(tmp_path, **blocks)
    first = next(iter(specs.values()))
    files = [path for _, (path,) in first.data.files()]
    with deployed(tmp_path / "deployment", across(first), files) as deployment:
        for name, spec in specs.items():
            run = tmp_path / name
            (deployment.folder / "recipe.yaml").write_text(dump_recipe(across(spec)))
            launch(across(spec), run, deployment.folder, False, Silent())
            start_run(spec, run.with_suffix(".local"))
            same_bits(run.with_suffix(".local"), run)
            there, here = RunDir(run).records(), RunDir(run.with_suffix(".local")).records()
            for one, other in zip(there, here, strict=True):
                assert one["secure"] and set(one["clients"]) == set(SIZES)
                assert not one["lost"] and not one["refused"]
                spent = one["privacy"]["epsilon"]
                assert spent.keys() == set(SIZES)
                assert spent == pytest.approx(other["privacy"]["epsilon"])
                assert one["privacy"].get("clip") == other["privacy"].get("clip")
        shown = deployment.log("ann")
        # the keys to what Flower still remembers
        assert not [*deployment.folder.glob("clients/*/*round.key")]
    assert "SHA256:" in shown and "these keys are believed" in shown


def across(spec: Recipe) -> Recipe:
    return remote(without_files(spec, spec.data.path), wait_for_clients=500.0, min_clients=3)


def test_a_simulation_brings_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = secured(recipe(tmp_path, federation={"clients": 3, "rounds": 2}))
    raw = remote(spec, wait_for_clients=300.0, round_timeout=300.0, min_clients=3).model_dump()
    raw["engine"]["kind"] = "flower-simulation"
    raw["federation"].pop("partition")
    simulate(Recipe.model_validate(raw), tmp_path / "run", False, Silent())
    start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    assert not [*tmp_path.rglob("*round.key")]
