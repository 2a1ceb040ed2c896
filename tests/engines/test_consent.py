"""Which runs a client takes part in, what it writes down of messages, and what leaves it."""

import json
import logging
import stat
from dataclasses import replace

import pytest
import torch
from small_runs import recipe

from benchmarks.spoil import about as about_of
from engines.in_process import InProcess, institution, institutions, remote, without_files
from engines.test_site import Notes, about
from engines.test_wire import quick, timeless  # noqa: F401 (a fixture)
from fedex_lora.engines.remote import audit as audit_module
from fedex_lora.engines.remote import guests, site
from fedex_lora.engines.remote.audit import Audit
from fedex_lora.engines.remote.consent import Consent, Undecided
from fedex_lora.engines.remote.site import handle
from fedex_lora.engines.remote.wire import facts
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.federation.codec import encode_about, encode_broadcast
from fedex_lora.federation.messages import Broadcast
from fedex_lora.flower import client_app
from fedex_lora.flower.client_app import most_turns, reply_to
from fedex_lora.flower.deploy.asking import Asking
from fedex_lora.flower.deploy.init import Deployment, init
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run

SECRET = "Mrs Miller, born 1950"


def run(number):
    return f"{number:032x}"


def refused(consent, number):
    with pytest.raises(Undecided) as error:
        consent.greeted(run(number))
    with pytest.raises(Undecided):
        consent.turn(run(number), 9)
    return error.value.first


def test_a_client_takes_part_in_as_many_runs_as_it_was_told(tmp_path):
    consent = Consent(tmp_path / "runs.json")
    assert consent.left() == 1
    for number in range(5):
        consent.greeted(run(number))  # costs nothing: it may come to nothing
    consent.turn(run(3), 9)
    assert consent.left() == 0 and list(consent.joined()) == [run(3)]
    assert refused(consent, 4) and not refused(consent, 4) and refused(consent, 5)
    again = Consent(tmp_path / "runs.json")  # a program that was started again
    again.greeted(run(3))  # the same run, resumed
    again.turn(run(3), 9)
    assert not refused(again, 4)
    again.allow()
    again.turn(run(4), 9)
    assert refused(again, 6)
    more = Consent(tmp_path / "runs.json", runs=3)
    more.turn(run(6), 9)
    assert more.left() == 1  # three, and the one that was allowed besides
    assert stat.S_IMODE((tmp_path / "runs.json").stat().st_mode) == 0o600


def test_a_run_has_so_many_turns_and_no_more(tmp_path):
    consent = Consent(tmp_path / "runs.json", runs=2)
    for _ in range(4):
        consent.turn(run(1), 4)
    with pytest.raises(UserError, match="this run has had 4 turns"):
        consent.turn(run(1), 4)
    consent.turn(run(2), 4)


def test_who_asks_for_thousands_of_runs_does_not_fill_the_disk(tmp_path):
    consent = Consent(tmp_path / "runs.json", runs=0)
    for number in range(200):
        assert refused(consent, number)
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 50


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"more": 1}', '{"more": "9", "runs": {}}', '{"more": 0, "runs": {"a": {}}}', "{"],
)
def test_a_damaged_memory_is_no_permission(text, tmp_path):
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(UserError, match=r"runs\.json: damaged"):
        Consent(tmp_path / "runs.json").greeted(run(1))
    assert (tmp_path / "runs.json").read_text() == text


def test_every_run_is_asked_about_at_a_terminal(tmp_path, monkeypatch):
    consent, said = Consent(tmp_path / "runs.json", ask=True), []
    lines = ["perhaps\n", "y\n", "n\n"]
    ready = [False]
    monkeypatch.setattr(
        "fedex_lora.flower.deploy.asking.select.select", lambda *_: (["it"] if ready.pop() else [],)
    )
    monkeypatch.setattr("sys.stdin.readline", lambda: lines.pop(0), raising=False)
    asking = Asking(consent, said.append)

    def look(answered):
        ready.append(answered)
        asking.look()

    asking.look()
    assert not said
    refused(consent, 1)
    look(False)
    look(False)
    assert said == ["The coordinator begins run 00000000. Take part? [y/n]"]
    look(True)
    assert "Expected y or n" in said.pop() and refused(consent, 1) is False
    look(True)
    assert said.pop() == "run 00000000: takes part"
    consent.turn(run(1), 9)
    refused(consent, 2)
    look(True)
    assert said.pop() == "run 00000000: declined"
    with pytest.raises(UserError, match="its operator has declined this run"):
        consent.greeted(run(2))
    assert consent.waiting() is None


@pytest.fixture
def ann(tmp_path):
    """(node configuration, folder) of a client whose messages are handled in this process."""
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 2})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(remote(without_files(spec))))
    home = tmp_path / "home"
    node = {"client": "ann", "recipe": str(tmp_path / "recipe.yaml"), "home": str(home), "runs": 1}
    return {**node, "data": str(tmp_path / "data" / "ann.jsonl")}, home


def hello(federation, agreed=None, digests=None):
    said = {"protocol": site.PROTOCOL, "kind": "hello", "federation": federation}
    return encode_about(
        {**said, "lineage": [[0, "m"]], "agreed": agreed or {}, "digests": digests or {}}
    )


def lines(home):
    return [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]


def test_a_second_run_is_not_joined_unasked(ann, caplog, monkeypatch):
    node, home = ann
    brought = client_app.institution(node, client_app.load_recipe(home.parent / "recipe.yaml"))
    monkeypatch.setattr(client_app, "institution", lambda place, spec, *_: brought)
    mine = facts(brought.recipe, brought.stage.task, brought.stage.model, brought.initial)

    def told(blob):
        return about_of(reply_to(blob, node, {"runs": 99, "ask": 0}))  # whatever the server says

    def round_of(federation):
        return encode_broadcast(Broadcast(1), about={**about(brought), "federation": federation})

    first, second = run(1), run(2)
    assert told(hello(first, mine.agreed, mine.digests))["kind"] == "hello"
    assert told(round_of(first))["kind"] == "update"
    monkeypatch.setattr(client_app, "institution", lambda *_: pytest.fail("the rows were read"))
    with caplog.at_level(logging.WARNING, "fedex_lora"):
        for _ in range(2):
            reply = told(hello(second, mine.agreed, mine.digests))
            assert reply["kind"] == "undecided" and "not said yet" in reply["reason"]
    assert caplog.text.count("fedex-lora deploy allow") == 1
    assert told(round_of(second))["kind"] == "undecided"
    monkeypatch.setattr(client_app, "institution", lambda place, spec, *_: brought)
    assert told(round_of(first))["kind"] == "update"  # resumed
    Consent(home / "runs.json").allow()
    assert told(hello(second, mine.agreed, mine.digests))["kind"] == "hello"
    assert told(round_of(second))["kind"] == "update"


def test_a_run_is_no_more_rounds_than_its_recipe_s(ann, monkeypatch):
    node, home = ann
    spec = client_app.load_recipe(home.parent / "recipe.yaml")
    brought = client_app.institution(node, spec)
    for kind, version in (("round", 2), ("final", 3), ("round", 99)):
        said = {**about(brought), "kind": kind, "version": version}
        blob = encode_broadcast(Broadcast(version + 1), about=said)
        told = about_of(handle(blob, brought))
        assert told["kind"] == "failed" and "this client's recipe has 2 rounds" in told["reason"]
    assert most_turns(spec) == 4 * 2 + 10
    monkeypatch.setattr(client_app, "most_turns", lambda spec: 2)
    monkeypatch.setattr(client_app, "institution", lambda place, spec, *_: brought)
    blob = encode_broadcast(Broadcast(1), about=about(brought))
    replies = [about_of(reply_to(blob, node, {})) for _ in range(3)]
    assert [reply["kind"] for reply in replies] == ["update", "update", "failed"]
    assert "this run has had 2 turns" in replies[-1]["reason"]


def test_rounds_are_among_what_must_agree(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 3})
    nodes = institutions(spec, tmp_path / "cache")
    four = remote(spec, rounds=4, wait_for_clients=0.1)
    with pytest.raises(QuorumLost, match=r"federation.rounds: 3 here, 4 at the coordinator"):
        start_run(four, tmp_path / "run", None, across_machines(InProcess(nodes)))


def test_the_coordinator_asks_a_client_whose_operator_has_yet_to_speak_again(tmp_path, monkeypatch):
    monkeypatch.setattr(guests, "AGAIN", 0.0)
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier, notes = InProcess(institutions(spec, tmp_path / "cache")), Notes()
    left = [3]

    def change(node, reply):
        said = about_of(reply)
        if node == "bob" and said["kind"] == "hello" and left[0]:
            left[0] -= 1
            return encode_about({**said, "kind": "undecided", "reason": "its operator ..."})
        return reply

    courier.change = change
    start_run(remote(spec), tmp_path / "run", notes, across_machines(courier))
    assert sorted(timeless(tmp_path / "run")[0]["clients"]) == ["ann", "bob", "cleo"]
    assert left == [0] and [t for t in notes.texts if "operator" in t] == [
        "client bob: its operator ..."
    ]


def test_for_whom_is_waited_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(guests, "PATIENT", 0.0)
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    other = recipe(tmp_path, training={"learning_rate": 0.5}, federation={"clients": 3})
    nodes = institutions(spec, tmp_path / "cache")
    nodes["bob"] = institution(other, "bob", other.data.clients[1], tmp_path / "cache")
    del nodes["cleo"]
    notes, few = Notes(), remote(without_files(spec), wait_for_clients=0.2)
    few = few.model_copy(
        update={"data": recipe(tmp_path).data.model_copy(update={"clients": None})}
    )
    with pytest.raises(QuorumLost):
        start_run(few, tmp_path / "run", notes, across_machines(InProcess(nodes)))
    waiting = [text for text in notes.texts if "ready, waiting for" in text]
    assert waiting[-1].startswith("1 of 3 ready, waiting for bob, cleo until ")
    assert "; not ready: bob: " in waiting[-1] and "learning_rate: 0.5 here" in waiting[-1]
    assert len(waiting) <= 3  # when it changes, not at every look


def test_every_message_is_a_line_at_both_ends(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 2})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(remote(without_files(spec))))
    homes = {name: tmp_path / "homes" / name for name in ("ann", "bob", "cleo")}
    received = []

    class Wired(InProcess):
        def owner(self, node):
            return node

        def send(self, node, blob, round, seconds):
            place = {"client": node, "recipe": str(tmp_path / "recipe.yaml"), "runs": 1}
            place |= {"home": str(homes[node]), "data": str(tmp_path / "data" / f"{node}.jsonl")}
            ticket = str(len(self.sent))
            self.sent.append((round, node))
            reply = reply_to(blob, place, {})
            received.append((blob, reply))
            self._replies[ticket] = (node, reply)
            return ticket

    courier = Wired(dict.fromkeys(homes))  # type: ignore[arg-type]
    log = tmp_path / "audit.jsonl"
    coordinator = remote(without_files(spec, tmp_path / "data"))
    start_run(coordinator, tmp_path / "run", None, across_machines(courier, Audit(log)))
    here = [json.loads(line) for line in log.read_text().splitlines()]
    there = [line for home in homes.values() for line in lines(home)]
    for field in ("bytes", "digest", "kind", "round", "run"):
        for mine, theirs in (("out", "in"), ("in", "out")):
            assert sorted(one[field] for one in here if one["direction"] == mine) == sorted(
                one[field] for one in there if one["direction"] == theirs
            ), field
    assert len(here) == len(there) == 2 * len(received) == 2 * 3 * (1 + 2 + 1)
    fields = ["time", "run", "round", "kind", "direction", "peer", "bytes", "digest", "outcome"]
    assert all(list(one) == fields for one in here + there)
    ann = [
        (one["kind"], one["round"], one["direction"], one["outcome"]) for one in lines(homes["ann"])
    ]
    assert ann[2:4] == [("round", 1, "in", "received"), ("update", 1, "out", "answered")]
    assert {one["outcome"] for one in here} == {"sent", "admitted", "taken"}
    text = log.read_text() + "".join((home / "audit.jsonl").read_text() for home in homes.values())
    rows = (tmp_path / "data" / "ann.jsonl").read_text().splitlines()
    assert not any(json.loads(row)["text"] in text for row in rows)


def test_what_is_refused_stands_in_the_log_with_the_reason(tmp_path):
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    courier = InProcess(
        institutions(spec, tmp_path / "cache"),
        change=lambda node, reply: reply[:-4] if node == "bob" and len(reply) > 2000 else reply,
    )
    log = tmp_path / "audit.jsonl"
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier, Audit(log)))
    found = [json.loads(line) for line in log.read_text().splitlines()]
    (bad,) = [one for one in found if "cannot be" in one["outcome"]]
    assert (bad["peer"], bad["direction"], bad["round"], bad["kind"]) == ("bob", "in", 1, None)


def test_the_log_is_appended_to_and_set_aside_when_it_has_grown(tmp_path, monkeypatch):
    audit = Audit(tmp_path / "audit.jsonl")
    monkeypatch.setattr(audit_module, "_LARGE", 2000)
    stamps = iter(f"2030010{i}-000000" for i in range(1, 10))
    monkeypatch.setattr(audit_module.time, "strftime", lambda *_: next(stamps))
    for number in range(30):
        audit.write("in", "round", run(1), number, b"x", "taken")
        audit.write("in", {"odd": 1}, "x\n" * 9, 10**400, b"", "long " * 100, "peer")
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) > 3 and all(file.stat().st_size < 3000 for file in files)
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(one["round"] for one in found if one["kind"]) == list(range(30))
    odd = [one for one in found if not one["kind"]]
    assert len(odd) == 30 and all(
        one["run"] is one["round"] is None and len(one["outcome"]) == 200 for one in odd
    )
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_nothing_goes_on_without_the_log(ann):
    node, home = ann
    home.mkdir()
    (home / "audit.jsonl").mkdir()
    with pytest.raises(UserError, match="the audit log cannot be written"):
        reply_to(hello(run(1)), node, {})


def _foreign():
    raise ValueError(SECRET)


def _wrapped():
    try:
        _foreign()
    except ValueError as error:
        raise UserError(f"training: it says {error}") from None


def _memory():
    raise MemoryError(SECRET)


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (_foreign, "ValueError; its own log says why"),
        (_wrapped, "training: ValueError; its own log says why"),
        (_memory, "MemoryError; its own log says why"),
    ],
)
@pytest.mark.parametrize("where", ["training", "scoring", "set up"])
def test_what_is_not_ours_does_not_leave_the_client_in_words(
    where, fails, told, ann, monkeypatch, caplog
):
    node, home = ann
    brought = client_app.institution(node, client_app.load_recipe(home.parent / "recipe.yaml"))
    asked, broken = about(brought), lambda *_, **__: fails()
    if where == "set up":
        monkeypatch.setattr(client_app, "set_up_client", broken)
    else:
        scored = replace(brought, validation=brought.rows)
        monkeypatch.setattr(client_app, "institution", lambda place, spec, *_: scored)
    if where == "training":
        monkeypatch.setattr(site, "take_turns", broken)
    elif where == "scoring":
        monkeypatch.setattr(site.Stage, "score", broken)
        asked |= {"kind": "evaluate", "evaluate": True}
    reply = reply_to(encode_broadcast(Broadcast(1), about=asked), node, {})
    said = about_of(reply)
    assert said["kind"] == "failed" and said["reason"] == told
    assert SECRET.encode() not in reply and SECRET in caplog.text
    assert SECRET not in (home / "audit.jsonl").read_text()


def test_rows_that_cannot_be_used_are_shown_by_place_and_forty_characters(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "fedex_lora.flower.deploy.processes.attend", lambda *_: pytest.fail("a node was started")
    )
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(remote(without_files(recipe(tmp_path)))))
    secret = "Mrs Miller, born 1950 in Aachen, insured with the AOK, is ill with gout"
    rows = tmp_path / "rows.jsonl"
    client = ("client", tmp_path / "d", "--name", "ann", "--recipe", tmp_path / "recipe.yaml")
    for row in ({"text": "x", "label": secret}, {"text": [secret], "label": 0}):
        rows.write_text(json.dumps(row) + "\n")
        code, _, errors = command("deploy", *client, "--data", rows)
        assert code == 2 and "line 1" in errors and "--show-rows" in errors
        assert secret[:30] in errors and secret[:45] not in errors
        code, _, errors = command("deploy", *client, "--data", rows, "--show-rows")
        assert code == 2 and secret in errors
    command("--version")
    assert torch.get_num_threads() == 1
