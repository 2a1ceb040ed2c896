"""Sums over real processes: TLS, node keys, signatures, sealed secrets. Minutes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from small_runs import SIZES, recipe

from engines.deployed import deployed
from engines.in_process import remote, without_files
from engines.test_secure_messages import secured
from engines.test_wire import same_bits
from fedex_lora.flower.deploy.launch import launch, simulate
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.watch import Silent

pytestmark = pytest.mark.deployment


def test_real_processes_bring_the_bits_of_one(tmp_path: Path) -> None:
    spec = secured(recipe(tmp_path, federation={"clients": 3, "rounds": 2}))
    across = remote(without_files(spec, spec.data.path), wait_for_clients=500.0, min_clients=3)
    files = [path for _, (path,) in spec.data.files()]
    with deployed(tmp_path / "deployment", across, files) as deployment:
        launch(across, tmp_path / "run", deployment.folder, False, Silent())
        shown = deployment.log("ann")
        left = [*deployment.folder.glob("clients/*/*round.key")]
    start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["secure"] and set(record["clients"]) == set(SIZES)
        assert not record["lost"] and not record["refused"]
    assert "SHA256:" in shown and "these keys are believed" in shown
    assert not left  # the keys to what Flower still remembers


def test_training_with_noise_brings_the_bits_of_one_process(tmp_path: Path) -> None:
    """A rehearsal of DP-SGD, whose draws and noise repeat."""
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    given = recipe(tmp_path, federation={"clients": 3, "rounds": 2}, training=small)
    raw = secured(given).model_dump()
    raw["federation"].pop("partition")
    by_row = {"example_level": {"noise_multiplier": 0.8, "delta": 1e-2}, "rehearsal": True}
    spec = Recipe.model_validate({**raw, "privacy": by_row})
    across = remote(without_files(spec, spec.data.path), wait_for_clients=500.0, min_clients=3)
    files = [path for _, (path,) in spec.data.files()]
    with deployed(tmp_path / "deployment", across, files) as deployment:
        launch(across, tmp_path / "run", deployment.folder, False, Silent())
    start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    here = (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()
    for line, other in zip(lines, here, strict=True):
        spent = [json.loads(x)["privacy"]["epsilon"] for x in (line, other)]
        assert spent[0].keys() == set(SIZES) and spent[0] == pytest.approx(spent[1])


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
