"""Whose a message is tells the node it came from; how many rows a client has is said once."""

import json

import pytest
from small_runs import StopAfter, recipe

from benchmarks.spoil import about
from engines.in_process import InProcess, institutions, remote
from engines.test_site import Notes
from engines.test_wire import quick, timeless  # noqa: F401 (a fixture)
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import encode_about
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import resume_run, start_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("identity")


def hello(node, **changes):
    """A change of what one node says in its first message."""

    def change(sender, reply):
        said = about(reply)
        greets = sender == node and said["kind"] == "hello"
        return encode_about({**said, **changes}) if greets else reply

    return change


def test_a_node_that_takes_another_s_name_is_refused_and_both_stand_in_the_record(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=hello("bob", client="ann"))
    notes = Notes()
    run = remote(spec, wait_for_clients=0.2)
    start_run(run, tmp_path / "run", notes, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["clients"]) == ["ann", "cleo"]
    assert "client bob calls itself ann" in record["lost"]["bob"]
    assert any("client bob calls itself ann" in text for text in notes.texts)


def test_too_large_a_share_stops_the_run_before_round_1(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=hello("bob", rows=10**9))
    with pytest.raises(UserError, match=r"client bob declares 1,000,000,000 of .*max_share is 0.9"):
        start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    assert not (tmp_path / "run").exists()


def test_who_comes_later_with_too_large_a_share_is_kept_out(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 3})
    courier = Arriving(
        institutions(spec, tmp_path / "cache"),
        absent={"bob": [0, 1]},
        change=hello("bob", rows=10**9),
    )
    run, notes = remote(spec, wait_for_clients=0.2), Notes()
    start_run(run, tmp_path / "run", notes, across_machines(courier))
    assert all(sorted(r["clients"]) == ["ann", "cleo"] for r in timeless(tmp_path / "run"))
    assert any("client bob declares 1,000,000,000" in text for text in notes.texts)


def test_rows_that_were_declared_hold_in_a_resumed_run(folder, tmp_path):
    spec = remote(recipe(folder, federation={"clients": 3, "rounds": 2}), wait_for_clients=0.2)
    nodes = institutions(spec_of(folder), tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "run", StopAfter(1), across_machines(InProcess(nodes)))
    stored = json.loads((tmp_path / "run" / "federation.json").read_text())
    assert stored["examples"] == {"ann": 9, "bob": 3, "cleo": 5}
    courier, notes = InProcess(nodes, change=hello("bob", rows=4)), Notes()
    resume_run(tmp_path / "run", None, notes, across_machines(courier))
    first, second = timeless(tmp_path / "run")
    assert first["weights"]["bob"] == 3 / 17 and sorted(second["clients"]) == ["ann", "cleo"]
    assert "client bob declared 3 rows before and 4 now" in second["lost"]["bob"]


def spec_of(folder):
    return recipe(folder, federation={"clients": 3, "rounds": 2})


class Arriving(InProcess):
    """Knows which round it is by what is sent."""

    def send(self, node, blob, round, seconds):
        self.round = max(self.round, round)
        return super().send(node, blob, round, seconds)
