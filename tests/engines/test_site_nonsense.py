"""Clients that send nonsense or cannot work: each costs its own part, and is named."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import recipe

from engines.in_process import InProcess, institution, institutions, remote, without_files
from engines.test_site import FEDERATION, Notes
from engines.test_wire import CLIENTS, quick, same_bits, timeless  # noqa: F401 (a fixture)
from fedex_lora.adapter import AdapterState
from fedex_lora.engines.courier import Failed
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.messages import (
    Update,
    decode_update,
    encode_about,
    encode_update,
    read_about,
)
from fedex_lora.flower.client_app import reply_to
from fedex_lora.flower.coordinator import across_machines
from fedex_lora.recipe_yaml import dump_recipe
from fedex_lora.run import start_run

METRICS = {"loss": 1.0, "steps": 1.0, "seconds": 1.0}


def bad(kind, reply):
    """What a broken or hostile client makes of its reply."""
    said = read_about(reply)
    if said["kind"] != "update":
        return reply
    tensors = {"a": torch.zeros(2)}
    update = Update(1, "bob", tensors, tensors, {}, 3, METRICS)
    start = AdapterState()
    mine = decode_update(reply, start)
    return {
        "noise": b"\x07" * 100,
        "another run": encode_update(update, None, torch.float32, {**said, "federation": "f"}),  # type: ignore[arg-type]
        "another site": encode_update(update, None, torch.float32, said),  # type: ignore[arg-type]
        "huge": reply + b"\x00" * 5_000_000,
        "raises": Failed("its program failed; its own log says why"),
        "another kind": encode_about({**said, "kind": "hello"}),
        "endless": encode_about({**said, "kind": "lacks", "version": float("inf")}),
        "other metrics": encode_update(replace(mine, metrics={"scores": 1.0}), start, about=said),
        "strange scores": encode_update(replace(mine, scores={"x": 1.0}), start, about=said),
        "infinite": encode_update(replace(mine, scores={"accuracy": 1e999}), start, about=said),
        "nested": b"\x10\x27\x00\x00\x00\x00\x00\x00" + b"[" * 10000,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("noise", "cannot be read"),
        ("another run", "belongs to another run"),
        ("another site", "'a' was not asked for"),
        ("huge", "at most"),
        ("raises", "its program failed"),
        ("another kind", "was not asked for"),
        ("nested", "cannot be read"),
        ("endless", "cannot convert float infinity"),
        ("other metrics", "metrics scores; expected loss, seconds, steps"),
        ("strange scores", "its scores lack accuracy"),
        ("infinite", "its score accuracy is infinite"),
    ],
)
def test_a_client_that_sends_nonsense_costs_its_update_and_nothing_else(kind, reason, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    courier = InProcess(
        institutions(spec, tmp_path / "cache"),
        change=lambda node, reply: bad(kind, reply) if node == "bob" else reply,
    )
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["clients"]) == ["ann", "cleo"]
    assert reason in {**record["refused"], **record["lost"]}["bob"]


def test_too_few_clients_stop_the_run_with_reasons(tmp_path, caplog):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 2, "min_clients": 3})
    other = recipe(tmp_path, training={"learning_rate": 0.5}, federation={"clients": 3})
    nodes = institutions(spec, tmp_path / "cache")
    nodes["bob"] = institution(other, "bob", other.data.clients[1], tmp_path / "cache")
    few = remote(spec, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=r"2 clients are ready.*bob.*training.learning_rate: 0.5"):
        start_run(few, tmp_path / "run", None, across_machines(InProcess(nodes)))
    twins = {"ann": nodes["ann"], "again": nodes["ann"]}
    with pytest.raises(QuorumLost, match="two clients are called ann"):
        start_run(few, tmp_path / "run", None, across_machines(InProcess(twins)))
    refused = r"the coordinator refuses this client: .two clients are called ann; give each"
    assert re.search(refused, caplog.text)  # in the log of the client


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "noon", "versions": [1]},
        {"time": float("inf"), "versions": None},
        {"time": 10**400, "versions": {"torch": {"a": 1}}},
    ],
)
def test_strange_remarks_in_a_first_message_cost_nothing(changes, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=rewritten(**changes))
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    assert sorted(timeless(tmp_path / "run")[0]["clients"]) == ["ann", "bob", "cleo"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": None}, "a client without a name"),
        ({"client": 5}, "calls itself '5'"),
        ({"rows": 10**400}, "expected a count"),
        ({"rows": -1}, "expected a count"),
        ({"held": 1.5}, "expected a count"),
        ({"kind": "update"}, "is not ready"),
    ],
)
def test_a_strange_first_message_is_refused(changes, reason, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=rewritten(**changes))
    few = remote(spec, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=reason):
        start_run(few, tmp_path / "run", None, across_machines(courier))


@pytest.mark.parametrize("said", [[1], {"x": 1.0}, {"accuracy": float("inf")}, None])
def test_strange_scores_of_the_last_model_are_left_out(said, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1}, evaluation=CLIENTS)

    def change(node, reply):
        about = read_about(reply)
        strange = node == "bob" and about["kind"] == "scores"
        return encode_about({**about, "scores": said}) if strange else reply

    courier, notes = InProcess(institutions(spec, tmp_path / "cache"), change=change), Notes()
    start_run(remote(spec), tmp_path / "run", notes, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["client_scores"]) == ["ann", "cleo"]
    assert any("the last model did not reach bob" in text for text in notes.texts)


def rewritten(**changes):
    """bob's first message says something else."""

    def change(node, reply):
        said = read_about(reply)
        greets = node == "bob" and said["kind"] == "hello"
        return encode_about({**said, **changes}) if greets else reply

    return change


def test_a_client_with_another_protocol_is_named_at_the_coordinator(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=rewritten(protocol=2))
    few = remote(spec, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=r"client bob speaks protocol 2, not 1; install the same"):
        start_run(few, tmp_path / "run", None, across_machines(courier))


def test_a_clock_that_is_off_and_other_versions_are_noted(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    change = rewritten(time=time.time() - 3600, versions={"torch": "0.1"})
    courier, notes = InProcess(institutions(spec, tmp_path / "cache"), change=change), Notes()
    start_run(remote(spec), tmp_path / "run", notes, across_machines(courier))
    # an hour, and what has passed since this test began
    assert any(re.search(r"client bob: its clock is 3[67]\d\d s off", t) for t in notes.texts)
    assert any("client bob has" in text and "torch 0.1" in text for text in notes.texts)


def test_a_full_disk_at_a_client_costs_its_update_and_is_named(tmp_path, monkeypatch, caplog):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    courier, opened = InProcess(institutions(spec, tmp_path / "cache")), Path.open

    def full(path, mode="r", *rest, **more):
        bob = "bob" in path.parts and "w" in mode
        return opened(Path("/dev/full") if bob else path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["clients"]) == ["ann", "cleo"]
    assert "No space left on device" in record["lost"]["bob"]
    assert "No space left on device" in caplog.text  # and in the client's own log


@pytest.mark.parametrize(
    ("text", "log"),
    [(None, "no such file"), ('{"txt": "secret", "label": 0}', "no column 'text'")],
)
def test_unusable_rows_are_told_in_full_at_the_client_alone(text, log, tmp_path, caplog):
    spec = recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(without_files(spec)))
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    node = {"client": "ann", "recipe": tmp_path / "recipe.yaml", "data": rows, "home": tmp_path}
    hello = encode_about({"protocol": 1, "kind": "hello", "federation": FEDERATION})
    told = read_about(reply_to(hello, {k: str(v) for k, v in node.items()}, {}))
    assert told["kind"] == "unfit" and told["client"] == "ann"
    assert told["reason"] == "its data cannot be used; its own log says why"
    assert log in caplog.text
