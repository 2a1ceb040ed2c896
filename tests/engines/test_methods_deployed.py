"""Methods and options whose rounds have shapes of their own, over real processes. Minutes.

All are run in one deployment: a client's recipe is read anew for every message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe

from engines.deployed import deployed
from engines.in_process import remote, without_files
from engines.test_wire import CLIENTS, same_bits, timeless
from fedex_lora.flower.deploy.launch import launch
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.watch import Silent

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

ADAM = {"name": "fedadam", "learning_rate": 0.01}
FEDERATION = {"clients": 2, "rounds": 2}
SHAPES = {
    "gradients, then a matrix between the factors": {"method": {"name": "fed-sb"}},
    "a sparse change of whole weights, then factors": {"method": {"name": "slora"}},
    "a factor of the client's own": {"method": {"name": "fedsa"}, "evaluation": CLIENTS},
    "matrices of several heads": {"method": {"name": "ravan"}, "lora": {"r": 4}},
    "ranks that shrink": {
        "method": {"name": "hetlora", "options": {"decay": 0.5, "penalty": 0.02}},
        "federation": {**FEDERATION, "max_norm_ratio": 1000},
    },
    "a pair of the client's own": {"method": {"name": "feddpa"}, "evaluation": CLIENTS},
    "variates, and a server optimizer": {
        "federation": {**FEDERATION, "scaffold": True, "server_optimizer": ADAM},
    },
}


def here(folder: Path, blocks: Mapping[str, Any]) -> Recipe:
    """Of the three clients the first two, in one process."""
    files = recipe(folder).data.clients
    assert files is not None
    return recipe(folder, **{"federation": FEDERATION, "data": {"clients": files[:2]}, **blocks})


def across(spec: Recipe) -> Recipe:
    return remote(without_files(spec, spec.data.path), wait_for_clients=500.0, min_clients=2)


def test_they_are_the_local_runs_bit_for_bit(tmp_path: Path) -> None:
    plain = here(tmp_path, {})
    files = [path for _, (path,) in plain.data.files()]
    with deployed(tmp_path / "deployment", across(plain), files) as deployment:
        for shape, blocks in SHAPES.items():
            spec, run = here(tmp_path, blocks), tmp_path / shape
            (deployment.folder / "recipe.yaml").write_text(dump_recipe(across(spec)))
            launch(across(spec), run, deployment.folder, False, Silent())
            start_run(spec, run.with_suffix(".local"))
            same_bits(run.with_suffix(".local"), run)
            assert timeless(run.with_suffix(".local")) == timeless(run), shape
            assert not any(r["lost"] or r["refused"] for r in timeless(run))
