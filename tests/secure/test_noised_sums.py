"""Noise that the clients bring along: what the sum holds, what the server sees, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from crowd import Crowd, initial, settings
from small_runs import StopAfter, recipe

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.private.account import Steps, epsilon
from fedex_lora.errors import ProtocolError, QuorumLost
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import flat, only
from fedex_lora.federation.noise import SumNoise
from fedex_lora.federation.randomness import normal, rehearsed
from fedex_lora.federation.secure import fixed
from fedex_lora.federation.secure.member import Member
from fedex_lora.federation.secure.messages import Ask
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.secure.sums import Summand, sized
from fedex_lora.federation.settings import Secure
from fedex_lora.federation.state import begin
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir

NOISE = SumNoise(bound=0.2, deviation=0.4, least=3, seed=5)


def made(method="fedit", clients=4, noise=NOISE, **options):
    secured = Secure(threshold=noise.least, noise=noise)
    s = settings(method, clients, weights="uniform", secured=secured, **options)
    return s, begin(s, initial(s))


@pytest.mark.parametrize("method", ["fedit", "ffa", "full"])
def test_the_mean_has_a_share_of_noise_of_each_who_stayed(method):
    """Three of four stayed: the mean moves by Σ (clip(dᵢ) + N(0, 0.4²/3)) / 4."""
    s, state = made(method)
    crowd = Crowd({"c02": "train"}, spread=0.5)
    after, record = secure_round(state, s, crowd)
    assert "loss" not in record and not record["norms"]
    before = only(flat(initial(s)), s.method.sent(1))
    expected = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in before.items()}
    for client in ("c00", "c01", "c03"):
        bits = rehearsed(derive(5, "share of noise", 1, client))
        g = torch.Generator().manual_seed(derive(0, 1, client))  # as `Crowd` has it
        drift = {n: 0.5 * torch.randn(t.shape, generator=g).double() for n, t in before.items()}
        norm = math.sqrt(sum(t.square().sum().item() for t in drift.values()))
        assert norm > 0.2
        for name in sorted(drift):
            one = 0.4 / math.sqrt(3) * normal(bits, drift[name])
            expected[name] += (0.2 / norm * drift[name] + one) / 4
    now = {**flat(initial(s)), **{f"head/{n}": t for n, t in after.head.items()}}
    for name, factors in after.factors.items():
        now |= {f"A/{name}": factors.A, f"B/{name}": factors.B}
    for name, moved in expected.items():
        assert torch.allclose(now[name].double() - before[name], moved, atol=1e-6), name


@pytest.mark.parametrize("step, times", [("send", 1), ("open numbers", 0)])
def test_a_round_is_begun_anew_only_before_its_noised_sum_may_be_open(step, times):
    s, state = made()
    assert s.secure is not None
    s, crowd, notes = replace(s, secure=replace(s.secure, repeat=1)), Crowd(), []
    crowd.gone = {"c01": step, "c02": step}
    with pytest.raises(QuorumLost, match="3 must stay"):
        secure_round(state, s, crowd, notes.append)
    assert len(notes) == times


def test_as_many_shares_as_must_stay_make_the_whole_noise():
    noise, zero = SumNoise(0.2, 0.4, 3), {"B/q": torch.zeros(300, 400)}
    total = sum(noise.share(zero, client, 1)["B/q"] for client in "abc")
    assert isinstance(total, torch.Tensor)
    assert total.std().item() == pytest.approx(0.4, rel=0.02)
    assert not torch.equal(noise.share(zero, "a", 1)["B/q"], noise.share(zero, "a", 1)["B/q"])


def test_the_vote_for_sizes_tells_nothing_of_what_was_learned():
    def seen(size):
        tensors = {"count": torch.ones(1), "loss": torch.tensor([size, 1.0])}
        added = Summand({**tensors, "B/q": size * torch.ones(2, 2)}, 1.0)
        return (fixed.votes(sized(added, NOISE).tensors) != 0).tolist()

    assert seen(0.1) == seen(1e-9)


def test_a_client_opens_no_sum_with_less_noise_and_takes_no_other_unit():
    secure = Secure(threshold=3, noise=NOISE)
    added = Summand({"count": torch.ones(1), "loss": torch.zeros(2), "B/q": torch.ones(2, 2)}, 1.0)
    member = Member("a", everybody=["a", "b", "c", "d"], round=1)
    member.sessions = {"numbers": object()}  # type: ignore
    few = Ask("open", {"sum": "numbers", "present": ["a", "b", "b", "x"]}, 0)
    with pytest.raises(ProtocolError, match=r"a sum over 2 clients; the noise .* among 3"):
        member.answer(few, secure, lambda widths: added)
    finer = Ask("send", {"exponents": [1, -88, -9], "halvings": 0}, 3)
    with pytest.raises(ProtocolError, match="a unit that is not the bound"):
        member.answer(finer, secure, lambda widths: added)


def test_a_client_that_does_not_clip_is_found_out():
    s, state = made(max_norm=0.2)
    loud = Crowd(spread=0.5)
    after, _ = secure_round(state, s, loud)  # clipped and noised: within what noise can be
    assert after.version == 1
    honest = SumNoise(bound=0.2, deviation=1e-3, least=3, seed=5)
    others = SumNoise(bound=9.0, deviation=1e-3, least=3, seed=5)
    s, state = made(max_norm=0.2, noise=others)
    server = Secure(threshold=3, noise=honest)
    with pytest.raises(QuorumLost, match="somebody did not"):
        secure_round(state, s.__class__(**{**s.__dict__, "secure": server}), Unclipped(s, loud))


class Unclipped(Crowd):
    """Clients by another recipe than the server's."""

    def __init__(self, s, crowd):
        super().__init__(spread=crowd.spread)
        self.own = s

    def ask(self, exchange, asks):
        exchange.settings = self.own
        return super().ask(exchange, asks)


def private(folder, **level):
    given = {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3, **level}
    blocks = {"client_level": given, "secure_aggregation": True, "rehearsal": True}
    federation = {"weights": "uniform", "rounds": 2}
    return recipe(folder, method={"name": "ffa"}, federation=federation, privacy=blocks)


def test_a_rehearsal_is_resumed_bit_for_bit_with_its_account(tmp_path):
    whole = start_run(private(tmp_path), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start_run(private(tmp_path), tmp_path / "cut", StopAfter(1))
    resumed = resume_run(tmp_path / "cut")
    assert resumed["best"] == whole["best"] and resumed["privacy"] == whole["privacy"]
    last = RunDir(tmp_path / "cut").records()[-1]
    assert last["privacy"]["epsilon"]["ann"] == epsilon([Steps(0.8, 1.0, 2)], 1e-3)
    assert last["secure"] and "loss" not in last and "deviation" not in last


def test_clients_tell_in_the_sum_how_many_are_within_the_bound():
    """±½ of each, with a share of noise that is drawn after that of the drifts; at twice the bound
    of the recipe with twice the noise."""
    s, state = made(noise=replace(NOISE, of_count=0.3))
    quiet = Crowd(spread=1e-4)
    _, record = secure_round(state, replace(s, clip=0.4), quiet)
    expected = 0.0
    for client in s.clients:
        bits = rehearsed(derive(5, "share of noise", 1, client))
        drift = quiet.trained(Exchange(state, s, s.clients), client)[1].tensors
        for name in sorted(drift):
            normal(bits, drift[name].double())
        drawn = normal(bits, torch.empty(1, dtype=torch.float64)).item()
        expected += 0.5 + 0.3 / math.sqrt(3) * drawn
    assert record["within"] == pytest.approx(expected, abs=1e-9)
    _, loud = secure_round(state, replace(s, clip=0.4), Crowd(spread=0.5))
    assert loud["within"] == pytest.approx(expected - 4, abs=1e-9)
    assert replace(NOISE, of_count=0.3).at(0.4).deviation == 0.8


@pytest.mark.parametrize("bound", [0.0, 1e-10, 1e10, -1.0, math.nan, math.inf, 1, "1.0"])
def test_a_client_takes_no_bound_that_is_none_nor_one_beside_its_recipe_s(bound):
    with pytest.raises(ProtocolError, match="expected a number from 1e-09 to 1e\\+09"):
        replace(NOISE, of_count=0.3).at(bound)
    with pytest.raises(ProtocolError, match="its own recipe is fixed"):
        NOISE.at(bound)


def test_the_bound_follows_the_norms_that_nobody_sees(tmp_path):
    result = start_run(private(tmp_path, adaptive=True, clip=1e-4), tmp_path / "run")
    first, second = RunDir(tmp_path / "run").records()
    assert not {"within", "norms"} & first.keys()
    assert second["privacy"]["clip"] == first["privacy"]["next_clip"] != 1e-4
    assert result["privacy"]["epsilon"]["ann"] == epsilon([Steps(0.8, 1.0, 2)], 1e-3)
