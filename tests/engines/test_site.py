"""A client of its own: what it refuses, what it keeps on its disk, how it catches up."""

import json

import pytest
import torch
from small_runs import recipe

from benchmarks.spoil import about as about_of
from engines.in_process import ANY, InProcess, institution, institutions, remote
from engines.test_wire import CLIENTS, quick, same_bits, timeless  # noqa: F401 (a fixture)
from fedex_lora.aggregation.delta import Delta
from fedex_lora.engines.remote.cache import Cache, Held
from fedex_lora.engines.remote.site import handle
from fedex_lora.engines.remote.wire import PROTOCOL, Identity, agreed, agreement, facts
from fedex_lora.engines.setup import recipe_task
from fedex_lora.federation.codec import (
    decode_broadcast,
    encode_about,
    encode_broadcast,
    ledger_tensors,
)
from fedex_lora.federation.messages import Broadcast, flat
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.watch import Silent

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
        "protocol": PROTOCOL,
        "kind": "round",
        "federation": FEDERATION,
        "lineage": [[0, "mark"]],
        "client": "ann",
        "recipe": agreement(agreed(client.recipe, client.stage.task)),
        "version": 0,
        "held": 0,
    }


def asked(institution, message, changes):
    said = {**about(institution), **changes}
    return about_of(handle(encode_broadcast(message or Broadcast(1), about=said), institution))


SITE = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"client": "bob"}, None, "a message for 'bob'"),
        ({"recipe": "0"}, None, "the recipe has changed"),
        ({"federation": "../../etc"}, None, "without a federation's number"),
        ({"version": 1}, None, "messages are mixed up"),
        ({"held": "x"}, None, "without its held"),
        ({"kind": "exec"}, None, "of unknown kind"),
        ({}, Broadcast(1, {f"A/{SITE}": torch.zeros(3, 17)}), "does not fit the model"),
        ({}, Broadcast(1, {f"A/{SITE}": torch.full((3, 16), float("nan"))}), "is not finite"),
        ({}, Broadcast(1, {"B/" + "x" * 400: torch.zeros(3)}), "does not fit the model"),
    ],
)
def test_a_client_refuses_what_is_none_of_its_run_s_messages(ann, changes, message, reason):
    told = asked(ann, message, changes)
    assert told["kind"] == "failed" and reason in told["reason"]


def test_a_message_that_is_too_large_is_refused_before_it_is_decoded(ann):
    told = about_of(handle(b"\xff" * 5_000_000, ann))
    assert told["kind"] == "failed" and "at most" in told["reason"]


def test_what_does_not_agree_is_named_on_both_sides(ann):
    mine = facts(ann.recipe, ann.stage.task, ann.stage.model, ann.initial)
    said = {"protocol": PROTOCOL, "kind": "hello", "federation": FEDERATION, "lineage": [[0, "m"]]}

    def hello(**changes):
        theirs = {"agreed": dict(mine.agreed), "digests": dict(mine.digests), **changes}
        return about_of(handle(encode_about({**said, **theirs}), ann))

    assert hello()["kind"] == "hello"
    other = hello(agreed={**mine.agreed, "training.learning_rate": 0.5})
    assert other["kind"] == "unfit"
    assert "training.learning_rate: 0.02 here, 0.5 at the coordinator" in other["reason"]
    other = hello(digests={**mine.digests, "weights": "0"})
    assert "model.name: other pretrained weights" in other["reason"]
    old = about_of(handle(encode_about({**said, "protocol": 0}), ann))
    assert old["kind"] == "unfit" and "install the same version" in old["reason"]


def test_what_is_held_survives_on_disk_and_damage_is_noticed(ann, tmp_path):
    settings = ann.settings
    start = start_of(begin(settings, ann.initial), settings, "ann")
    ledger = begin(settings, ann.initial).ledger.append(1, {SITE: Delta(torch.ones(16, 16))})
    held = Held(1, "mark", start, ledger, {1: flat(start)})
    cache = Cache(tmp_path / "cache")
    cache.save(held)
    found = cache.load()
    assert found is not None and (found.version, found.mark) == (1, "mark")
    assert torch.equal(found.ledger.total(SITE), torch.ones(16, 16))
    assert torch.equal(found.ends[1][f"A/{SITE}"], start.layers[SITE].A)
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
            to_cleo[round] = decode_broadcast(blob, ANY)
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
    for site in held["ann"].ledger.layers():  # type: ignore[union-attr]
        mine, *others = (h.ledger.total(site) for h in held.values())  # type: ignore[union-attr]
        assert mine.norm() > 0
        assert all((mine - other).norm() <= 1e-6 * mine.norm() for other in others)  # type: ignore[operator]
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


def test_the_agreed_fields_leave_out_what_is_everybody_s_own(tmp_path):
    spec = recipe(tmp_path)
    names = agreed(spec, recipe_task(spec))
    assert names["training.learning_rate"] == 0.02 and names["task.labels"] == ["x", "y", "z"]
    assert not any("path" in n or n.startswith("engine") or n == "model.name" for n in names)
