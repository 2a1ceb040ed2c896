"""Flower's server app: the same run as in one process, with clients that the grid reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedex_lora.engines.remote.audit import FILE as AUDIT
from fedex_lora.engines.remote.audit import Audit
from fedex_lora.errors import QuorumLost, UserError, show_rows
from fedex_lora.flower.grid import FlowerCourier
from fedex_lora.flower.progress import Recorder
from fedex_lora.flower.refusals import known_keys
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import resume_run, start_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the recipe that the run's configuration names, on the coordinator's own disk."""
    config = context.run_config
    recorder = Recorder(Path(str(config["progress"])))
    try:
        results = _run(grid, config, recorder)
    except QuorumLost as error:
        recorder.ended("quorum", str(error))
        raise
    except UserError as error:
        recorder.ended("user", str(error))
        raise
    except BaseException as error:
        recorder.ended("fault", f"{type(error).__name__}: {error}")
        raise
    recorder.ended("done", "", results)


def _run(grid: Grid, config: Mapping[str, Any], recorder: Recorder) -> dict[str, Any]:
    show_rows(bool(config.get("show-rows")))
    os.chdir(str(config["folder"]))  # paths in the recipe are relative to where it was started
    path = Path(str(config["recipe"]))
    out, recipe = Path(str(config["out"])), load_recipe(path)
    keys = known_keys(path.parent.parent / "clients")  # of the deployment; a simulation has none
    audit = Audit(Path(str(config["progress"])).parents[1] / AUDIT)
    assemble = across_machines(FlowerCourier(grid, keys), audit)
    if config["resume"]:
        return resume_run(out, recipe, recorder, assemble)
    return start_run(recipe, out, recorder, assemble)
