"""Secure aggregation through real messages, and what a client does not let a coordinator have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SIZES, StopAfter, recipe

from engines.in_process import InProcess, institutions, remote
from fedex_lora.engines.remote import engine as remote_module
from fedex_lora.engines.remote import guests
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.site import handle
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.codec import encode_about
from fedex_lora.federation.header import first_of
from fedex_lora.recipe import Recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import resume_run, start_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (guests, remote_module):
        monkeypatch.setattr(module, "OFTEN", 0.0)


def secured(spec: Recipe) -> Recipe:
    raw = spec.model_dump()
    raw["privacy"]["secure_aggregation"] = True
    raw["evaluation"]["where"] = "server"
    return Recipe.model_validate(raw)


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])


def same(a: Path, b: Path) -> None:
    one, other = checkpoint(a), checkpoint(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_messages_bring_the_bits_of_one_process_and_nearly_those_of_plain_rounds(tmp_path) -> None:
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 2})
    start_run(secured(spec), tmp_path / "local")
    nodes = institutions(secured(spec), tmp_path / "cache")
    start_run(remote(secured(spec)), tmp_path / "remote", None, across_machines(InProcess(nodes)))
    same(tmp_path / "local", tmp_path / "remote")
    with pytest.raises(KeyboardInterrupt):
        start_run(secured(spec), tmp_path / "stopped", StopAfter(1))
    resume_run(tmp_path / "stopped")
    same(tmp_path / "local", tmp_path / "stopped")
    for run in ("local", "remote"):
        text = (tmp_path / run / "metrics.jsonl").read_text()
        record = json.loads(text.splitlines()[0])
        assert record["secure"] and set(record["clients"]) == set(SIZES)
        assert all(set(client) == {"examples"} for client in record["clients"].values())
    secrets = [json.loads(text) for node in nodes.values() for text in node.memory.values()]
    files = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".bin"]
    for member in secrets:
        for session in member["sessions"].values():
            for secret in (session["seed"], session["mask_key"], session["channel_key"]):
                assert not any(secret.encode() in f or bytes.fromhex(secret) in f for f in files)


def test_a_lost_client_is_left_out_and_below_the_threshold_the_run_stops(tmp_path) -> None:
    spec = secured(recipe(tmp_path, federation={"clients": 3, "rounds": 1}))
    gone = {"bob"}

    def lose(node: str, reply: bytes) -> bytes | Failed:
        about = first_of(reply)["about"]
        return Failed("gone") if node in gone and about.get("step") == "send" else reply

    nodes = institutions(spec, tmp_path / "cache")
    courier = InProcess(nodes, change=lose)
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert sorted(record["clients"]) == ["ann", "cleo"] and record["lost"] == {"bob": "gone"}
    gone.add("cleo")
    with pytest.raises(QuorumLost, match=r"1 clients are left; 2 must stay"):
        start_run(remote(spec), tmp_path / "few", None, across_machines(courier))


def test_a_client_whose_recipe_wants_sums_sends_no_update(tmp_path) -> None:
    spec = secured(recipe(tmp_path, federation={"clients": 3, "rounds": 1}))
    (node, *_) = institutions(spec, tmp_path / "cache").values()
    about = first_of(handle(encode_about({"kind": "round"}), node))["about"]
    assert about["kind"] == "failed" and "only sums are shown" in about["reason"]
