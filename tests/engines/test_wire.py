"""Runs through real messages, bit for bit the local engine's; catching up; nonsense."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_runs import recipe

from engines.in_process import InProcess, institutions, remote
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.remote import engine as remote_module
from fedex_lora.engines.remote import guests
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run

FEDERATED = [name for name, m in METHODS.items() if m.exchanges and not m.pooled]
CLIENTS = {"where": "clients", "client_fraction": 0.4}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (guests, remote_module):
        monkeypatch.setattr(module, "OFTEN", 0.0)


def checkpoint(run):
    return load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])


def same_bits(a, b):
    one, other = checkpoint(a), checkpoint(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def timeless(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
        for client in record["clients"].values():
            client.pop("seconds")
    return records


@pytest.mark.parametrize("name", FEDERATED)
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_through_messages_every_method_gives_the_local_engine_s_bits(name, wire, tmp_path):
    method = {"name": name, **({"rank": 2} if name == "fedex-svd" else {})}
    lora = {"ranks": [2, 5, 3]} if METHODS[name].ranks_may_differ else {}
    federation = {"clients": 3, "rounds": 3, "wire_dtype": wire}
    spec = recipe(tmp_path, method=method, lora=lora, federation=federation, evaluation=CLIENTS)
    results = start_run(spec, tmp_path / "local")
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    found = start_run(remote(spec), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    assert timeless(tmp_path / "local") == timeless(tmp_path / "remote")
    for key in ("last", "best", "best_round", "bytes_up", "bytes_down", "bytes_delivery"):
        assert found[key] == results[key], key
    for record in timeless(tmp_path / "remote"):
        for client, count in record["bytes_down"].items():
            assert count == courier.down[record["round"], client]
        for client, count in record["bytes_up"].items():
            assert count == courier.up[record["round"], client]
    assert len(courier.sent) == 3 * (1 + 2 * 3 + 1)  # hello, rounds and scores, the last model
