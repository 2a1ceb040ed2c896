"""Late updates in whole runs: rehearsed, resumed, and brought late by real messages."""

from __future__ import annotations

import pytest
from small_runs import StopAfter, recipe

from engines.in_process import institutions, remote
from engines.test_waiting import Slow
from engines.test_wire import quick, same_bits, timeless
from fedex_lora.errors import RecipeError
from fedex_lora.federation import loop
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.by_hand.opening import names_of
from fedex_lora.runs.run import resume_run, start_run

__all__ = ["quick"]


def without_seconds(run):
    records = timeless(run)
    for late in (late for record in records for late in record["late"].values()):
        late.pop("seconds")
    return records


def test_a_rehearsal_that_stopped_goes_on_bit_for_bit(tmp_path):
    late = {"staleness": 2, "exponent": 0.5, "delay": 0.6}
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 4, "asynchronous": late})
    start_run(spec, tmp_path / "whole")
    records = without_seconds(tmp_path / "whole")
    at = next(r["round"] for r in records if r["delayed"])
    assert any(r["late"] for r in records)
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "stopped", StopAfter(at))
    resume_run(tmp_path / "stopped")
    same_bits(tmp_path / "whole", tmp_path / "stopped")
    assert without_seconds(tmp_path / "stopped") == records


def test_a_reply_that_comes_a_round_late_is_the_rehearsed_one_s_bits(tmp_path, monkeypatch):
    federation = {"clients": 3, "rounds": 4, "asynchronous": {"staleness": 9}}
    spec = recipe(tmp_path, federation=federation)
    courier = Slow(institutions(spec, tmp_path / "cache"))
    run = remote(spec, round_timeout=1.0)
    start_run(run, tmp_path / "remote", None, across_machines(courier))
    records = timeless(tmp_path / "remote")
    assert [sorted(r["late"]) for r in records] == [[], ["bob, round 1"], [], ["bob, round 3"]]
    assert records[0]["lost"] == {"bob": "no reply within 1 s (federation.round_timeout)"}
    assert records[1]["lost"] == {"bob": "still at work on round 1"}
    assert records[1]["bytes_up"]["bob"] == courier.up[1, "bob"]

    def odd(state, settings, clients):
        return {"bob": 1} if state.version % 2 == 0 else {}

    monkeypatch.setattr(loop, "delays", odd)
    start_run(spec, tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "remote")
    for here, there in zip(timeless(tmp_path / "local"), records):
        assert here["weights"] == there["weights"] and here["scores"] == there["scores"]


def test_what_it_does_not_go_with_is_refused(tmp_path):
    on = {"clients": 3, "asynchronous": {"staleness": 2}}
    noise = {"example_level": {"delta": 1e-5, "noise_multiplier": 1}}
    for blocks, why in (
        ({"method": {"name": "fedit"}}, "through the ledger"),
        ({"privacy": noise}, "updates of one round"),
        ({"privacy": {"secure_aggregation": {}}}, "updates of one round"),
    ):
        with pytest.raises(ValueError, match=f"federation.asynchronous: .*{why}"):
            recipe(tmp_path, federation=on, **blocks)
    spec = recipe(tmp_path, federation=on)
    with pytest.raises(ValueError, match=r"federation.asynchronous.delay: a rehearsal"):
        remote(spec, asynchronous={"delay": 0.5})
    with pytest.raises(RecipeError, match=r"federation.asynchronous: a round by hand"):
        names_of(spec)
