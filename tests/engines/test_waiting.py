"""Late clients, too many, too few: who is waited for, who is dropped, and what is said of it."""

import pytest
from small_runs import recipe

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import quick, timeless  # noqa: F401 (a fixture)
from fedex_lora.engines.remote import guests
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.errors import QuorumLost
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run


class Slow(InProcess):
    """Replies of `slow` to a round's message come when the next round has begun, or never."""

    slow = "bob"

    def collect(self, tickets):
        now = max((round for round, _ in self.sent), default=0)
        late = {t for t in tickets if self.sent[int(t)] == (now, self.slow) and now > 0}
        return super().collect([t for t in tickets if t not in late])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("waiting")


def test_who_is_late_is_dropped_and_named(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 2})
    courier = Slow(institutions(spec, tmp_path / "cache"))
    run = remote(spec, round_timeout=1.0)
    start_run(run, tmp_path / "run", None, across_machines(courier))
    for record in timeless(tmp_path / "run"):
        assert sorted(record["clients"]) == ["ann", "cleo"]
        assert record["lost"] == {"bob": "no reply within 1 s (federation.round_timeout)"}


def test_of_more_than_are_needed_the_first_win(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1})
    courier = Slow(institutions(spec, tmp_path / "cache"))
    run = remote(spec, clients_per_round=2, oversample=1.3, round_timeout=2.0)
    start_run(run, tmp_path / "run", None, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["clients"]) == ["ann", "cleo"]
    assert record["lost"] == {"bob": "slower than the first 2 (oversample)"}
    assert record["bytes_down"]["bob"] == courier.down[1, "bob"]


def failing(times):
    """bob's connection breaks so many times."""
    left = [times]

    def change(node, reply):
        if node == "bob" and left[0] > 0 and b'\\"kind\\": \\"update' in reply[:4000]:
            left[0] -= 1
            return Failed("the connection to it was lost", gone=True)
        return reply

    return change


def test_below_the_quorum_a_broken_connection_is_waited_for(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=failing(2))
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert sorted(record["clients"]) == ["ann", "bob", "cleo"]
    assert record["bytes_down"]["bob"] == courier.down[1, "bob"] > 2 * record["bytes_down"]["ann"]


def test_above_the_quorum_it_is_not(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1, "min_clients": 2})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=failing(1))
    start_run(remote(spec), tmp_path / "run", None, across_machines(courier))
    (record,) = timeless(tmp_path / "run")
    assert record["lost"] == {"bob": "the connection to it was lost"}


def test_it_is_not_waited_for_for_ever(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1, "min_clients": 3})
    courier = InProcess(institutions(spec, tmp_path / "cache"), change=failing(10**9))
    run = remote(spec, wait_for_clients=0.5)
    with pytest.raises(QuorumLost, match=r"2 valid updates.*bob: the connection to it was lost"):
        start_run(run, tmp_path / "run", None, across_machines(courier))


def test_an_update_above_the_norm_bound_is_refused(folder, tmp_path):
    spec = recipe(folder, federation={"clients": 3, "rounds": 1})
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    run = remote(spec, max_norm=1e-6)
    with pytest.raises(QuorumLost, match=r"it changed by .*; federation.max_norm is 1e-06"):
        start_run(run, tmp_path / "run", None, across_machines(courier))


class Returns(InProcess):
    """bob's connection breaks in round 1; he is back after some looks."""

    away = 0

    def nodes(self):
        self.away = max(0, self.away - 1)
        return [n for n in super().nodes() if n != "bob" or not self.away]


def cut_off(folder, path, looks):
    """A run of two rounds; bob's connection breaks in the first, for so many looks."""
    spec = recipe(folder, federation={"clients": 3, "rounds": 2})
    courier, breaks = Returns(institutions(spec, path / "cache")), failing(1)

    def change(node, reply):
        found = breaks(node, reply)
        courier.away = looks if isinstance(found, Failed) else courier.away
        return found

    courier.change = change
    start_run(remote(spec), path / "run", None, across_machines(courier))
    first, second = timeless(path / "run")
    assert first["lost"] == {"bob": "the connection to it was lost"}
    return second


def test_who_was_cut_off_in_a_round_is_back_in_the_next(folder, tmp_path):
    assert sorted(cut_off(folder, tmp_path, 5)["clients"]) == ["ann", "bob", "cleo"]


def test_who_stays_away_is_waited_for_but_shortly(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(guests, "SOON", 0.1)
    second = cut_off(folder, tmp_path, 10**9)
    assert sorted(second["clients"]) == ["ann", "cleo"]
    assert second["lost"] == {"bob": "not connected"}
