"""Late clients, too many, too few: who is waited for, who is dropped, and what is said of it."""

import pytest
from small_runs import recipe

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import quick, timeless  # noqa: F401 (a fixture)
from fedex_lora.engines.courier import Failed
from fedex_lora.errors import QuorumLost
from fedex_lora.flower.coordinator import across_machines
from fedex_lora.run import start_run


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
    run = remote(spec, clients_per_round=2, oversample=1.3)
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
