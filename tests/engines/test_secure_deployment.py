"""Sums over real processes: TLS, node keys, signatures, sealed secrets. Minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import SIZES, recipe

from engines.deployed import deployed
from engines.in_process import remote, without_files
from engines.test_secure_messages import secured
from engines.test_wire import same_bits
from fedex_lora.flower.deploy.launch import launch
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
