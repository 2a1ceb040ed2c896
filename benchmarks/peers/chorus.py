"""A round of chorus (`pip install chorus-fl`): its server and its client, training by the Trainer.

Its own trainer is for causal language models alone; a turn here is as that one's: the model read
anew, the adapter of the round before merged into it, a fresh one, every example padded.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file

from benchmarks.peers.common import (
    Asked,
    Ended,
    adapted,
    base_model,
    bases,
    effective,
    scale,
    serve,
    train,
)
from fedex_lora.engines.setup import Federation

MODEL = "minilm"


def in_turn(connection: Connection, asked: Asked) -> None:
    """The server in a process of its own, the clients one after the other in this one."""
    sys.path.append(str(asked.chorus))
    whole = asked.federation()
    with TemporaryDirectory() as folder:
        weights = base_model(whole).state_dict()
        save_file({k: v.contiguous() for k, v in weights.items()}, f"{folder}/base.safetensors")
        server, url = served(asked, Path(folder), len(whole.clients))
        try:
            serve(connection, rounds(whole, url, Path(folder)))
        finally:
            server.kill()  # it would wait for its clients
            server.wait()


def served(asked: Asked, folder: Path, clients: int) -> tuple[subprocess.Popen[bytes], str]:
    """`chorus server`, with the base's weights, so that it can fold residuals into them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["server", "--model", MODEL, "--host", "127.0.0.1", "--port", port]
    words += ["--data-dir", folder / "server", "--min-deltas", clients]
    words += ["--base-weights", folder / "base.safetensors"]
    threads = {"PYTHONPATH": str(asked.chorus), "OMP_NUM_THREADS": str(asked.threads)}
    server = subprocess.Popen(
        [sys.executable, "-c", "from chorus.cli.main import cli; cli()", *map(str, words)],
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return server, url
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(f"chorus's server does not answer at {url}")


def rounds(whole: Federation, url: str, folder: Path) -> Iterator[Ended]:
    """Each from the adapter that the server gave out last."""
    clients: list[Any] = [
        import_module("chorus").ChorusClient(server=url, model_id=MODEL, client_id=name)
        for name in whole.clients
    ]
    lora = adapted(whole).peft_config["default"]
    pulled: Path | None = None
    while True:
        start = bases(begun(whole, lora, pulled))
        sent = [folder / client.client_id for client in clients]
        for client, own, rows in zip(clients, sent, whole.clients.values()):
            model = begun(whole, lora, pulled)
            train(model, rows, whole, padding="max_length")
            model.save_pretrained(str(own))
            client.submit_delta(adapter_path=own, dataset_size=len(rows))
        pulled = folder / "pulled"
        config = json.loads((sent[0] / "adapter_config.json").read_text())
        config |= {"task_type": None, "modules_to_save": None}  # it has sent no heads
        for client in clients:
            client.pull_latest(output_path=pulled, adapter_config=config)
        *files, given = (load_file(own / "adapter_model.safetensors") for own in (*sent, pulled))
        ends = [effective(start, own, scale(whole)) for own in files]
        yield Ended(
            start,
            ends,
            [len(rows) for rows in whole.clients.values()],
            {
                ", what its clients go on from": bases(begun(whole, lora, pulled)),
                ", its adapter under PEFT's names": effective(start, given, scale(whole)),
                ", its checkpoint": checkpoint(url, start),
            },
        )


def begun(whole: Federation, lora: Any, pulled: Path | None) -> PeftModel:
    """The model with a fresh adapter, on a base with the one that was pulled."""
    model = base_model(whole)
    if pulled is not None:
        model = PeftModel.from_pretrained(model, str(pulled)).merge_and_unload()
    found = get_peft_model(model, lora)
    assert isinstance(found, PeftModel)
    return found


def checkpoint(url: str, names: Any) -> Any:
    """The server's own global weights."""
    given = load(httpx.get(f"{url}/models/{MODEL}/checkpoint", timeout=600).content)
    return {name: given[f"{name}.weight"].double() for name in names}
