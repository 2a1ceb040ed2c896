"""A client of its own: what it refuses, what it keeps on its disk, how it catches up."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import recipe

from engines.in_process import InProcess, institution, institutions, remote, without_files
from engines.test_wire import CLIENTS, quick, same_bits, timeless  # noqa: F401 (a fixture)
from fedex_lora.adapter import AdapterState
from fedex_lora.engines.cache import Cache, Held
from fedex_lora.engines.courier import Failed
from fedex_lora.engines.site import handle
from fedex_lora.engines.wire import Identity, agreed, agreement, facts
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.messages import (
    Broadcast,
    Update,
    decode_broadcast,
    decode_update,
    encode_about,
    encode_broadcast,
    encode_update,
    ledger_tensors,
    read_about,
)
from fedex_lora.federation.state import begin, start_of
from fedex_lora.flower.client_app import reply_to
from fedex_lora.flower.coordinator import across_machines
from fedex_lora.recipe_yaml import dump_recipe
from fedex_lora.run import resume_run, start_run
from fedex_lora.setup import recipe_task
from fedex_lora.watch import Silent

FEDERATION = "0" * 32


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def ann(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ann")
    spec = recipe(folder, evaluation=CLIENTS)
    return institution(spec, "ann", spec.data.clients[0], folder / "cache")


def about(client):
    return {
        "protocol": 1,
        "kind": "round",
        "federation": FEDERATION,
        "lineage": [[0, "mark"]],
        "client": "ann",
        "recipe": agreement(agreed(client.recipe, client.task)),
        "version": 0,
        "held": 0,
        "own": 0,
        "evaluate": False,
    }


def asked(institution, message, changes):
    said = {**about(institution), **changes}
    return read_about(handle(encode_broadcast(message or Broadcast(1), about=said), institution))


SITE = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"client": "bob"}, None, "a message for 'bob'"),
        ({"recipe": "0"}, None, "the recipe has changed"),
        ({"federation": "../../etc"}, None, "without a federation's number"),
        ({"version": 3}, None, "messages are mixed up"),
        ({"held": "x"}, None, "without its held"),
        ({"kind": "exec"}, None, "of unknown kind"),
        ({}, Broadcast(1, A={SITE: torch.zeros(3, 17)}), "does not fit the model"),
        ({}, Broadcast(1, A={SITE: torch.full((3, 16), float("nan"))}), "is not finite"),
        ({}, Broadcast(1, B={"x" * 400: torch.zeros(3)}), "does not fit the model"),
    ],
)
def test_a_client_refuses_what_is_none_of_its_run_s_messages(ann, changes, message, reason):
    told = asked(ann, message, changes)
    assert told["kind"] == "failed" and reason in told["reason"]


def test_a_message_that_is_too_large_is_refused_before_it_is_decoded(ann):
    told = read_about(handle(b"\xff" * 5_000_000, ann))
    assert told["kind"] == "failed" and "at most" in told["reason"]


def test_what_does_not_agree_is_named_on_both_sides(ann):
    mine = facts(ann.recipe, ann.task, ann.model, ann.initial)
    said = {"protocol": 1, "kind": "hello", "federation": FEDERATION, "lineage": [[0, "m"]]}

    def hello(**changes):
        theirs = {"agreed": dict(mine.agreed), "digests": dict(mine.digests), **changes}
        return read_about(handle(encode_about({**said, **theirs}), ann))

    assert hello()["kind"] == "hello"
    other = hello(agreed={**mine.agreed, "training.learning_rate": 0.5})
    assert other["kind"] == "unfit"
    assert "training.learning_rate: 0.02 here, 0.5 at the coordinator" in other["reason"]
    other = hello(digests={**mine.digests, "weights": "0"})
    assert "model.name: other pretrained weights" in other["reason"]
    old = read_about(handle(encode_about({**said, "protocol": 0}), ann))
    assert old["kind"] == "unfit" and "install the same version" in old["reason"]


def test_what_is_held_survives_on_disk_and_damage_is_noticed(ann, tmp_path):
    settings = ann.settings
    start = start_of(begin(settings, ann.initial), settings, "ann")
    ledger = begin(settings, ann.initial).ledger.append(1, {SITE: torch.ones(16, 16)})
    held = Held(1, "mark", start, ledger, {1: start.sites})
    cache = Cache(tmp_path / "cache")
    cache.save(held)
    found = cache.load()
    assert found is not None and (found.version, found.mark) == (1, "mark")
    assert torch.equal(found.ledger.total(SITE), torch.ones(16, 16))
    assert torch.equal(found.ends[1][SITE].A, start.sites[SITE].A)
    file = next((tmp_path / "cache").glob("ledger-1-*"))
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-5], b""):
        file.write_bytes(damaged)
        assert cache.load() is None
    file.write_bytes(whole)
    assert cache.load() is not None
    index = tmp_path / "cache" / "held.json"
    text = index.read_text()
    for damaged in (text.replace('"version": 1', '"version": 2'), text[:-9], "[]", "{}"):
        assert damaged != text
        index.write_text(damaged)
        assert cache.load() is None


def test_versions_of_a_history_that_was_thrown_away_are_not_held():
    identity = Identity("f", ((0, "a"), (3, "b"), (2, "c")))
    assert identity.holds(2, "a") and not identity.holds(3, "a")
    assert not identity.holds(3, "b") and identity.holds(3, "c")
    assert not identity.holds(0, "of another run")


@pytest.mark.parametrize("name", ["fedex", "fedex-keep", "fedex-hetero", "rolora"])
def test_a_lost_cache_costs_bytes_and_changes_nothing(name, tmp_path):
    federation = {"clients": 3, "rounds": 4}
    spec = recipe(tmp_path, method={"name": name}, federation=federation)
    start_run(spec, tmp_path / "local")
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    normal = courier.send

    def send(node, blob, round, seconds):
        if round == 3 and node == "bob" and (3, "bob") not in courier.sent:
            for file in (tmp_path / "cache").rglob("bob/*"):
                file.unlink()
        return normal(node, blob, round, seconds)

    courier.send = send  # type: ignore[method-assign]
    notes = Notes()
    start_run(remote(spec), tmp_path / "remote", notes, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    assert any("bob lost what it held" in text for text in notes.texts)
    whole = timeless(tmp_path / "remote")[2]["bytes_down"]
    assert whole["bob"] == courier.down[3, "bob"] > whole["ann"]


def nbytes(ledger):
    return sum(t.numel() * t.element_size() for t in ledger_tensors(ledger).values())


def test_absent_clients_and_one_that_joins_late_catch_up(tmp_path):
    """bob is away in rounds 2 and 3; cleo joins in round 7 of 10, nobody having heard of her."""
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 10})
    nodes = institutions(spec, tmp_path / "cache")
    courier = InProcess(nodes, {"bob": (2, 3), "cleo": range(7)})
    normal, ledgers, to_cleo = courier.send, {}, {}

    def send(node, blob, round, seconds):
        courier.round = max(courier.round, round)
        if node == "cleo" and round == 7:
            to_cleo[round] = decode_broadcast(blob)
        return normal(node, blob, round, seconds)

    courier.send = send  # type: ignore[method-assign]
    raw = remote(spec, wait_for_clients=0.0).model_dump()
    raw["federation"].pop("partition")
    raw["data"] |= {"clients": None, "path": tmp_path / "data"}
    coordinator = type(spec).model_validate(raw)

    class Clock(Silent):
        def round_done(self, record):
            courier.round = record["round"] + 1
            if record["round"] == 7:  # a veteran holds version 6, in the form that the server had
                veteran = Cache(next((tmp_path / "cache").rglob("ann"))).load()
                ledgers[veteran.version] = veteran.ledger  # type: ignore[union-attr]

    start_run(coordinator, tmp_path / "remote", Clock(), across_machines(courier))
    records = timeless(tmp_path / "remote")
    both, all_three = ["ann", "bob"], ["ann", "bob", "cleo"]
    expected = [both, ["ann"], ["ann"], both, both, both, *([all_three] * 4)]
    assert [sorted(r["clients"]) for r in records] == expected
    assert records[1]["lost"] == {"bob": "not connected"}
    held = {n: Cache(next((tmp_path / "cache").rglob(n))).load() for n in nodes}
    for site in held["ann"].ledger.sites():  # type: ignore[union-attr]
        mine, *others = (h.ledger.total(site) for h in held.values())  # type: ignore[union-attr]
        assert mine.norm() > 0
        assert all((mine - other).norm() <= 1e-6 * mine.norm() for other in others)
    assert nbytes(to_cleo[7].ledger) == nbytes(ledgers[6].since(0))
    seventh, fourth = records[6]["bytes_down"], records[3]["bytes_down"]
    assert seventh["cleo"] == courier.down[7, "cleo"]
    more = nbytes(ledgers[6].since(0)) - nbytes(ledgers[6].since(5))
    assert more > 0 and abs(seventh["cleo"] - seventh["ann"] - more) < 600  # names in headers
    assert fourth["bob"] > fourth["ann"]


def test_a_coordinator_that_dies_goes_on_with_the_same_clients_bit_for_bit(tmp_path):
    spec = recipe(tmp_path, evaluation=CLIENTS, federation={"clients": 3, "rounds": 4})
    start_run(spec, tmp_path / "local")
    nodes = institutions(spec, tmp_path / "cache")

    class Dies(Silent):
        def round_done(self, record):
            if record["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_run(remote(spec), tmp_path / "run", Dies(), across_machines(InProcess(nodes)))
    courier = InProcess(institutions(spec, tmp_path / "cache"))  # every message is a new process
    resume_run(tmp_path / "run", None, None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "run")
    assert timeless(tmp_path / "local") == timeless(tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "federation.json").read_text())["lineage"]) == 2


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
    node = {"client": "ann", "recipe": tmp_path / "recipe.yaml", "data": rows, "cache": tmp_path}
    hello = encode_about({"protocol": 1, "kind": "hello", "federation": FEDERATION})
    told = read_about(reply_to(hello, {k: str(v) for k, v in node.items()}, {}))
    assert told["kind"] == "unfit" and told["client"] == "ann"
    assert told["reason"] == "its data cannot be used; its own log says why"
    assert log in caplog.text


def test_the_agreed_fields_leave_out_what_is_everybody_s_own(tmp_path):
    spec = recipe(tmp_path)
    names = agreed(spec, recipe_task(spec))
    assert names["training.learning_rate"] == 0.02 and names["task.labels"] == ["x", "y", "z"]
    assert not any("path" in n or n.startswith("engine") or n == "model.name" for n in names)
