"""The app in `examples/flower_app`: in this process, in Flower's simulation, and deployed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from peft import PeftModel, get_peft_model_state_dict

from fedex_lora.aggregation.delta import Delta
from fedex_lora.flower.arrays import RESIDUAL, TRAINS, packed
from fedex_lora.flower.deploy.processes import free_port, listens
from flower.nodes import InProcess, identity, served  # noqa: F401

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_app"
CONFIG = {"num-server-rounds": 3, "fraction-train": 1.0, "learning-rate": 0.01, "local-steps": 5}
LAYERS = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]
SCALE = 2.0  # α/r of the example
Weights = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("identity")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], object]]:
    """Imports a module of the example."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield lambda name: importlib.import_module(f"tiny_llm.{name}")
    for name in [name for name in sys.modules if name.startswith("tiny_llm")]:
        del sys.modules[name]


def pretrained(app) -> Weights:
    plain = dict(app("model").get_model().named_modules())
    return {n: plain[f"base_model.model.{n}"].base_layer.weight.double() for n in LAYERS}


def expected(app, clients: int) -> Weights:
    """What the app must come to, in float64 and without the strategy: each round the mean of the
    clients' dense weights; the base is what the averages leave of it."""
    key = "base_model.model.{}.lora_{}.weight".format
    w0 = pretrained(app)
    base, rows = dict(w0), app("model").ROWS
    shares = [len(rows[i % len(rows)]) for i in range(clients)]
    shares = [n / sum(shares) for n in shares]
    arrays, g = get_peft_model_state_dict(app("model").get_model()), dict(w0)
    for round in range(CONFIG["num-server-rounds"]):
        change = {n: Delta((base[n] - w0[n]).float()) for n in LAYERS} if round else {}
        about = ConfigRecord({TRAINS: "AB", RESIDUAL: packed(change)})
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": about})
        ends = []
        for node in served(app("client_app").app, clients, CONFIG):
            reply = node(Message(content, dst_node_id=1, message_type="train"))
            arrived = reply.content.array_records["arrays"].to_torch_state_dict()
            ends.append({name: tensor.double() for name, tensor in arrived.items()})
        mean = {
            name: sum((w * e[name] for w, e in zip(shares, ends)), torch.zeros(()))
            for name in arrays
        }
        for n in LAYERS:
            products = [SCALE * e[key(n, "B")] @ e[key(n, "A")] for e in ends]
            g[n] = base[n] + sum(w * product for w, product in zip(shares, products))
            base[n] = g[n] - SCALE * mean[key(n, "B")] @ mean[key(n, "A")]
        arrays = {name: tensor.float() for name, tensor in mean.items()}
    return g


def exported(app, path: Path) -> Weights:
    """The weights of the adapter that the app saved, put on the pretrained model by PEFT."""
    model = PeftModel.from_pretrained(app("model").get_model().unload(), str(path))
    plain = dict(model.merge_and_unload().named_modules())
    return {name: plain[name].weight.double() for name in LAYERS}


def same(found: Weights, right: Weights, w0: Weights) -> None:
    """To rounding, relative to the change."""
    for name, g in right.items():
        error = torch.linalg.norm(found[name] - g) / torch.linalg.norm(g - w0[name])
        assert error < 1e-5, (name, error)


def test_in_this_process(app, tmp_path):
    grid = InProcess(served(app("client_app").app, 3, CONFIG))
    config = {**CONFIG, "save-path": str(tmp_path / "adapter")}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    app("server_app").app(grid, context)
    same(exported(app, tmp_path / "adapter"), expected(app, 3), pretrained(app))


def test_each_file_is_short_and_shows_the_line_it_replaces():
    for file in EXAMPLE.rglob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file
    assert "# strategy = FedAvg(" in (EXAMPLE / "tiny_llm" / "server_app.py").read_text()
    client = (EXAMPLE / "tiny_llm" / "client_app.py").read_text()
    assert "# set_peft_model_state_dict(" in client


# --- Flower's own processes


class Flower:
    """Flower's programs on this machine, without TLS, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        (folder / "home").mkdir()
        address = f'address = "127.0.0.1:{self.port}"'
        (folder / "home" / "config.toml").write_text(
            f"[superlink.here]\n{address}\ninsecure = true\n"
        )
        own = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, program: str, *arguments: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [program, "--insecure", *arguments],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def flwr(self, *arguments: str) -> str:
        argv = ["flwr", *arguments, "--format", "json"]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def run(self, config: str, options: Sequence[str] = ()) -> None:
        """The example, to its end."""
        told = self.flwr("run", str(EXAMPLE), "here", "--run-config", config, *options)
        found = re.search(r'"run-id"\s*:\s*"?(\d+)', told)
        assert found, told
        until = time.monotonic() + 300
        while time.monotonic() < until:
            told = self.flwr("list", "here", "--run-id", found[1])
            status = json.loads(told[told.index("{") :])["runs"][0]["status"]
            if status.startswith("finished"):
                assert status == "finished:completed", (status, self.log())
                return
            time.sleep(1)
        raise AssertionError(self.log())


@contextlib.contextmanager
def flower(folder: Path, nodes: int, simulation: bool) -> Iterator[Flower]:
    programs = Flower(folder)
    try:
        kind = ["--simulation"] if simulation else []
        programs.start("flower-superlink", "--port", str(programs.port), *kind)
        until = time.monotonic() + 120
        while not listens(programs.port):
            assert time.monotonic() < until, programs.log()
            time.sleep(0.2)
        for i in range(0 if simulation else nodes):
            config = f"partition-id={i} num-partitions={nodes}"
            link, port = f"127.0.0.1:{programs.port}", str(free_port())
            programs.start("flower-supernode", "--superlink", link, "--host", "127.0.0.1",
                           "--port", port, "--node-config", config)  # fmt: skip
        yield programs
    finally:
        for process in reversed(programs.processes):
            process.terminate()
        for process in programs.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


@pytest.mark.deployment
@pytest.mark.parametrize("simulation", [True, False], ids=["simulation", "deployment"])
def test_it_is_exact_in_flower_s_own_processes(app, tmp_path, simulation):
    if simulation:
        pytest.importorskip("ray")
    config = f'save-path="{tmp_path / "adapter"}"'
    options = ("--federation-config", "num-supernodes=2 client-resources-num-cpus=1")
    with flower(tmp_path, 2, simulation) as programs:
        programs.run(config, options if simulation else ())
    same(exported(app, tmp_path / "adapter"), expected(app, 2), pretrained(app))
