"""Clients that send nonsense or cannot work: each costs its own part, and is named."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from small_runs import recipe

from benchmarks.spoil import about, parts, whole
from engines.in_process import InProcess, institution, institutions, remote, without_files
from engines.test_site import FEDERATION, Notes
from engines.test_wire import CLIENTS, quick, same_bits, timeless  # noqa: F401 (a fixture)
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.wire import PROTOCOL
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.codec import encode_about
from fedex_lora.flower.client_app import reply_to
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run


def bad(kind, reply):
    """What a broken or hostile client makes of its reply."""
    tensors, meta = parts(reply)
    said = meta["about"]
    if said["kind"] != "update":
        return reply
    name = next(n for n in tensors if n.startswith("B/"))
    raw = {
        "noise": b"\x07" * 100,
        "huge": reply + b"\x00" * 5_000_000,
        "raises": Failed("its program failed; its own log says why"),
        "nested": b"\x10\x27\x00\x00\x00\x00\x00\x00" + b"[" * 10000,
        "long header": whole({}, {"about": said, "more": "x" * 72_500}),
        "twice": whole(tensors, json.dumps(meta)[:-1] + ', "examples": 3}'),
        "a long reason": encode_about({**said, "kind": "failed", "reason": "x" * 50_000}),
        "a longer reason": encode_about({**said, "kind": "failed", "reason": "x" * 900_000}),
    }
    if kind in raw:
        return raw[kind]
    changed = {
        "another run": {"about": {**said, "federation": "f"}},
        "another kind": {"about": {**said, "kind": "hello"}},
        "another name": {"about": {**said, "client": "ann"}},
        "nobody's name": {"about": {**said, "client": "zoe"}},
        "no name": {"about": {n: v for n, v in said.items() if n != "client"}},
        "endless": {"about": {**said, "kind": "lacks", "version": float("inf")}},
        "a reason that is none": {"about": {**said, "kind": "failed", "reason": [1]}},
        "strange names of metrics": {"metrics": {"loss\x1b[31m": 1.0}},
        "too many metrics": {"metrics": {f"x{i}": 1.0 for i in range(1000)}},
        "an infinite metric": {"metrics": {"loss": 1e999}},
        "a metric as text": {"metrics": {"loss": "1", "steps": 1, "seconds": 1}},
        "too many examples": {"examples": 10**9},
        "half an example": {"examples": 3.7},
        "a truth as examples": {"examples": True},
        "a round as text": {"round": "1"},
        "an old round": {"round": 0},
        "drift of another type": {"drift": 0},
    }
    if kind in changed:
        return whole(tensors, {**meta, **changed[kind]})
    spoiled = {
        "another site": {"A/a": torch.zeros(2)},
        "another shape": {name: torch.zeros(2, 2)},
        "another dtype": {name: tensors[name].double()},
        "NaN": {name: tensors[name] * float("nan")},
        "1e19": {n: t + 1e19 for n, t in tensors.items()},
        "times 10000": {n: t * 1e4 for n, t in tensors.items()},
    }
    return whole({**tensors, **spoiled[kind]}, meta)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("noise", "cannot be read"),
        ("another run", "belongs to another run"),
        ("another site", "A of 'a' was not asked for"),
        ("another shape", "has shape (2, 2); expected"),
        ("another dtype", "has dtype F64; expected float32 or bfloat16"),
        ("another name", "client bob calls itself ann"),
        ("nobody's name", "client bob calls itself zoe"),
        ("no name", "a client calls itself 'None'"),
        ("huge", "at most"),
        ("long header", "a header of 72,"),
        ("raises", "its program failed"),
        ("another kind", "'hello', which was not asked for"),
        ("nested", "cannot be read"),
        ("twice", "a key that is given twice"),
        ("endless", "version: Input should be a valid integer, got 'inf'"),
        ("a long reason", "xxx"),
        ("a longer reason", "at most"),
        ("a reason that is none", "reason: Input should be a valid string"),
        ("strange names of metrics", "metrics with strange names, or too many"),
        ("too many metrics", "metrics with strange names, or too many"),
        ("an infinite metric", "its training loss is inf; expected a finite number"),
        ("a metric as text", "loss: expected a number, got '1'"),
        ("too many examples", "trained on 1000000000 examples; it declared 3 before round 1"),
        ("half an example", "examples: expected a whole number, got '3.7'"),
        ("a truth as examples", "examples: expected a whole number, got 'True'"),
        ("a round as text", "round: expected a whole number, got '1'"),
        ("an old round", "sent an update of round 0; expected round 1"),
        ("drift of another type", "drift: expected true or false"),
        ("NaN", "entries that are NaN or infinite"),
        ("1e19", "has entries of 1e+19; at most 1e+12 are taken"),
        ("times 10000", "federation.max_norm_ratio is 10"),
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
    told = {**record["refused"], **record["lost"]}["bob"]
    assert reason in told and len(told) <= 1000


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
        ({"client": None}, "calls itself 'None'"),
        ({"client": 5}, "calls itself '5'"),
        ({"client": "ann"}, "bob: client bob calls itself ann"),
        ({"rows": 10**400}, "rows: Input should be less than or equal to"),
        ({"rows": -1}, "rows: Input should be greater than or equal to 1, got '-1'"),
        ({"rows": True}, "rows: Input should be a valid integer, got 'True'"),
        ({"held": 1.5}, "held: Input should be a valid integer, got '1.5'"),
        ({"kind": "update"}, "client bob answers with 'update'"),
    ],
)
def test_a_strange_first_message_is_refused(changes, reason, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=rewritten(**changes))
    few = remote(spec, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=reason):
        start_run(few, tmp_path / "run", None, across_machines(courier))


STRANGE = [
    ([1], "scores: Input should be a valid dictionary"),
    ({"x": 1.0}, "its scores lack accuracy"),
    ({"accuracy": 1e300}, "its score accuracy is 1e+300; expected 0 to 1"),
    ({"accuracy": float("inf")}, "its score accuracy is inf; expected 0 to 1"),
    ({"accuracy": -0.5}, "its score accuracy is -0.5; expected 0 to 1"),
    (None, "scores: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("scores", "reason"), STRANGE)
def test_strange_scores_are_left_out_and_named(scores, reason, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1}, evaluation=CLIENTS)

    def change(node, reply):
        said = about(reply)
        strange = node == "bob" and said["kind"] == "scores"
        return encode_about({**said, "scores": scores}) if strange else reply

    courier, notes = InProcess(institutions(spec, tmp_path / "cache"), change=change), Notes()
    start_run(remote(spec), tmp_path / "run", notes, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["client_scores"]) == ["ann", "cleo"]
    (told,) = [text for text in notes.texts if text.startswith("round 1: no scores of bob: ")]
    assert reason in told


@pytest.mark.parametrize("scores", [{}, {"accuracy": float("nan"), "loss": 0.1}])
def test_a_client_that_scores_some_rounds_only_does_not_choose_the_best(scores, tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 3}, evaluation=CLIENTS)

    def change(node, reply):
        said = about(reply)
        second = node == "bob" and said["kind"] == "scores" and said["version"] == 2
        return encode_about({**said, "scores": scores}) if second else reply

    courier, notes = InProcess(institutions(spec, tmp_path / "cache"), change=change), Notes()
    results = start_run(remote(spec), tmp_path / "run", notes, across_machines(courier))
    by = [record["scored_by"] for record in timeless(tmp_path / "run")]
    assert by == [["ann", "bob", "cleo"], ["ann", "cleo"], ["ann", "bob", "cleo"]]
    assert results["best_round"] == 3
    assert any("rounds were scored by different clients" in text for text in notes.texts)


def rewritten(**changes):
    """bob's first message says something else."""

    def change(node, reply):
        said = about(reply)
        greets = node == "bob" and said["kind"] == "hello"
        return encode_about({**said, **changes}) if greets else reply

    return change


def test_a_client_with_another_protocol_is_named_at_the_coordinator(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=rewritten(protocol=1))
    few = remote(spec, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=rf"client bob speaks protocol 1, not {PROTOCOL}; install"):
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
    hello = encode_about({"protocol": PROTOCOL, "kind": "hello", "federation": FEDERATION})
    told = about(reply_to(hello, {k: str(v) for k, v in node.items()}, {}))
    assert told["kind"] == "unfit" and told["client"] == "ann"
    assert told["reason"] == "its data cannot be used; its own log says why"
    assert log in caplog.text
