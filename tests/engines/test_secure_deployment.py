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
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

pytestmark = pytest.mark.deployment


def ran(folder: Path, spec: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """The records of a run over real processes and of the same in one, of equal bits, and what a
    client was shown."""
    across = remote(without_files(spec, spec.data.path), wait_for_clients=500.0, min_clients=3)
    files = [path for _, (path,) in spec.data.files()]
    with deployed(folder / "deployment", across, files) as deployment:
        launch(across, folder / "run", deployment.folder, False, Silent())
        shown = deployment.log("ann")
        # the keys to what Flower still remembers
        assert not [*deployment.folder.glob("clients/*/*round.key")]
    start_run(spec, folder / "local")
    same_bits(folder / "local", folder / "run")
    there, here = (RunDir(folder / name).records() for name in ("run", "local"))
    for record in there:
        assert record["secure"] and set(record["clients"]) == set(SIZES)
        assert not record["lost"] and not record["refused"]
    return there, here, shown


def test_noised_sums_of_real_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """A rehearsal, whose noise repeats; a round's bound follows the norms of the one before."""
    level = {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3, "adaptive": True}
    privacy = {"client_level": level, "secure_aggregation": True, "rehearsal": True}
    federation = {"clients": 3, "rounds": 2, "weights": "uniform"}
    spec = recipe(tmp_path, method={"name": "ffa"}, federation=federation, privacy=privacy)
    there, here, shown = ran(tmp_path, spec)
    assert [r["privacy"] for r in there] == [r["privacy"] for r in here]
    assert there[1]["privacy"]["clip"] != 0.01
    assert "SHA256:" in shown and "these keys are believed" in shown


def test_sums_of_training_with_noise_have_the_bits_of_one_process(tmp_path: Path) -> None:
    """A rehearsal of DP-SGD, whose draws and noise repeat."""
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    by_row = {"example_level": {"noise_multiplier": 0.8, "delta": 1e-2}, "rehearsal": True}
    privacy = {**by_row, "secure_aggregation": True}
    federation = {"clients": 3, "rounds": 2}
    spec = recipe(tmp_path, federation=federation, training=small, privacy=privacy)
    there, here, _ = ran(tmp_path, spec)
    for one, other in zip(there, here, strict=True):
        spent = one["privacy"]["epsilon"]
        assert spent.keys() == set(SIZES) and spent == pytest.approx(other["privacy"]["epsilon"])


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
