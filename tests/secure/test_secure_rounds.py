"""Rounds in which the server sees sums alone come to what plain ones come to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from crowd import Crowd, initial, settings
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.secure.messages import Answer
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.federation.state import ServerState, base_increment, begin, global_factors

FIT = sorted(name for name, method in METHODS.items() if method.unfit_for_sums() is None)
STEPS = ["keys", "shares", "train", "open sizes", "send"]


def model(state: ServerState, s: Settings) -> dict[str, torch.Tensor]:
    """G − W0 of every layer, dense, and the head."""
    found: dict[str, torch.Tensor] = dict(state.head)
    shared = global_factors(state, s)
    for name, layer in s.layers.items():
        delta = torch.zeros(layer.out, layer.inp)
        if (increment := base_increment(state.ledger, name)) is not None:
            delta += increment.dense()
        found[name] = delta + shared[name].delta().dense() if shared else delta
    return found


def assert_close(got: dict, want: dict, tolerance: float = 1e-6) -> None:
    for name, value in want.items():
        error = torch.linalg.vector_norm(got[name] - value) / torch.linalg.vector_norm(value)
        assert error < tolerance, (name, error.item())


def both_ways(method: str, clients: int, rounds: int = 1, gone=None, **options):
    """Records of secure and plain rounds, which come to the same from the same state each."""
    secure, plain = (settings(method, clients, x, **options) for x in (True, False))
    state, crowd = begin(secure, initial(secure)), Crowd(gone)
    for _ in range(rounds):
        after, record = secure_round(state, secure, crowd)
        want, told = run_round(state, plain, crowd)
        # where a product is cut by its singular values, float32 (of the plain way too) decides
        # what is cut if two of them are close; what was summed is right nevertheless
        method_ = METHODS[method]
        cut = method_.residual == "truncated" or "product" in method_.assignment.needs
        assert_close(model(after, secure), model(want, plain), 1e-5 if cut else 1e-6)
        for name in want.carry:
            whole = [s.ledger.newest()[name] + s.carry[name] for s in (after, want)]
            size = torch.linalg.vector_norm(model(want, plain)[name])
            assert (whole[0] - whole[1]).norm() < 1e-6 * size, name
        state = want
        yield record, told


def test_methods_that_are_no_functions_of_sums_say_why() -> None:
    assert {"fedex", "fedex-hetero", "fedex-reinit", "fedex-svd", "fedit", "fedsvd"} <= {*FIT}
    assert {"ffa", "flexlora", "full", "rolora"} <= {*FIT}
    assert "keep each client's own factors" in str(METHODS["fedex-keep"].unfit_for_sums())
    assert "nothing to sum" in str(METHODS["local"].unfit_for_sums())
    assert "reads means" in str(METHODS["fedex"].unfit_for_sums(ranks_differ=True))
    for name, method in METHODS.items():
        if "ends" in method.assignment.needs:
            assert "by themselves" in str(method.unfit_for_sums()), name


@pytest.mark.parametrize("method", FIT)
def test_a_secure_round_comes_to_what_a_plain_one_does(method: str) -> None:
    *_, (record, told) = both_ways(method, 3, rounds=3)
    assert record["weights"] == told["weights"] and record["norms"] == {}
    if "deviation" in record:
        assert record["deviation"] == pytest.approx(told["deviation"], rel=1e-5)
    assert all("loss" not in client for client in record["clients"].values())
    mean = sum(told["weights"][c] * client["loss"] for c, client in told["clients"].items())
    assert record["loss"] == pytest.approx(mean)


@given(st.data())
@tried(max_examples=12, deadline=None)
def test_whatever_the_method_the_clients_and_the_absent(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(FIT))
    count = data.draw(st.integers(2, 8))
    names = [f"c{i:02}" for i in range(count)]
    options: dict = {"server_learning_rate": data.draw(st.sampled_from([1.0, 0.6]))}
    if METHODS[method].ranks_may_differ:
        options["ranks"] = {n: data.draw(st.integers(1, 4)) for n in names}
    options["weights"] = data.draw(st.sampled_from(["examples", "uniform"]))
    away = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=(count - 1) // 2))
    # who was lost before its numbers came counts as absent; afterwards it does no more
    gone = {name: data.draw(st.sampled_from(STEPS[2:])) for name in away}
    assert len([*both_ways(method, count, 2, gone, **options)]) == 2


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_is_lost_at_any_step_is_left_out(step: str) -> None:
    ((record, _),) = both_ways("fedex", 4, gone={"c01": step})
    assert sorted(record["clients"]) == ["c00", "c02", "c03"]
    assert record["lost"] == {"c01": f"away at {step}"}


def test_who_is_lost_after_its_numbers_came_still_counts() -> None:
    s = settings("fedex", 4)
    state = begin(s, initial(s))
    after, record = secure_round(state, s, Crowd({"c01": "open numbers"}))
    whole, _ = secure_round(state, s, Crowd())
    assert sorted(record["clients"]) == ["c00", "c01", "c02", "c03"]
    assert torch.equal(model(after, s)["q"], model(whole, s)["q"])  # masks leave no trace


def test_many_clients_and_a_dense_sum() -> None:
    ((record, _),) = both_ways("fedex", 50, gone={"c07": "send", "c33": "train"})
    assert len(record["clients"]) == 48


def test_below_the_threshold_the_state_stands() -> None:
    s = settings("fedex", 4)
    state = begin(s, initial(s))
    lost = {"c01": "train", "c02": "open sizes"}
    with pytest.raises(QuorumLost, match=r"3 must stay.*c01: away at train; c02: away at open"):
        secure_round(state, s, Crowd(lost))
    strict = replace(s, secure=Secure(threshold=4))
    with pytest.raises(QuorumLost, match="3 clients are left; 4 must stay"):
        secure_round(state, strict, Crowd({"c01": "shares"}))
    again, _ = secure_round(state, s, Crowd())
    assert again.version == 1


def test_a_round_that_loses_too_many_is_begun_anew_as_often_as_is_allowed() -> None:
    s = settings("fedex", 4, secured=Secure(repeat=2))
    state, notes = begin(s, initial(s)), list[str]()
    whole, undisturbed = secure_round(state, s, Crowd())
    assert "begun_anew" not in undisturbed
    crowd = Crowd({"c01": "train", "c02": "send"})

    def back(text: str) -> None:
        notes.append(text)
        crowd.gone = {}

    after, record = secure_round(state, s, crowd, back)
    assert record["begun_anew"] == 1 and record["lost"] == {} and len(notes) == 1
    assert "3 must stay" in notes[0] and "begun anew (1 of 2)" in notes[0]
    assert torch.equal(model(after, s)["q"], model(whole, s)["q"])
    assert record["bytes_up"]["c00"] > 1.9 * undisturbed["bytes_up"]["c00"]
    assert record["bytes_down"]["c00"] > 1.5 * undisturbed["bytes_down"]["c00"]

    lost, notes = {"c01": "train", "c02": "send"}, []
    with pytest.raises(QuorumLost, match="3 must stay"):
        secure_round(state, s, Crowd(lost), notes.append)
    assert len(notes) == 2


@pytest.mark.parametrize("method", ["fedex-svd", "fedask-both"])
def test_a_sketch_of_lower_rank_is_nearly_the_best_of_it(method: str) -> None:
    exact, small = (settings(method, 6, secured=Secure(rank=p)) for p in (None, 10))
    state = begin(exact, initial(exact))
    crowd = Crowd()
    want, told = secure_round(state, exact, crowd)
    got, record = secure_round(state, small, crowd)
    off = torch.linalg.vector_norm(model(got, small)["q"] - model(want, exact)["q"])
    ideal, _ = secure_round(state, whole := settings("fedex", 6), crowd)
    best = (model(ideal, whole)["q"] - model(want, exact)["q"]).norm()  # left out anyway
    assert 0 < off < 1.5 * best
    assert 0 < record["bytes_up"]["c00"] < told["bytes_up"]["c00"]


def test_a_sum_that_cannot_be_right_is_refused() -> None:
    s = settings("fedex", 3)
    state = begin(s, initial(s))

    def noise(step: str, answer: Answer) -> Answer:
        if step == "send" and answer.client == "c01":
            return replace(answer, vector=answer.vector * 3)
        return answer

    with pytest.raises(QuorumLost, match=r"rows sum to .* they declared 24"):
        secure_round(state, s, Crowd(forged=noise))


def test_numbers_that_nobody_can_train_from_stay_with_their_client() -> None:
    class Broken(Crowd):
        def trained(self, exchange, client):
            start, update = super().trained(exchange, client)
            if client == "c02":
                bad = {n: t * torch.nan for n, t in update.tensors.items()}
                update = Update(update.round, client, bad, update.examples)
            return start, update

    s = settings("fedex", 4)
    _, record = secure_round(begin(s, initial(s)), s, Broken())
    assert "an entry of nan" in record["refused"]["c02"]
    assert sorted(record["clients"]) == ["c00", "c01", "c03"]


def test_the_mean_is_held_to_the_bound_that_clients_clip_to() -> None:
    s = settings("fedex", 3, max_norm=0.1)
    with pytest.raises(QuorumLost, match=r"the mean changed by .*federation.max_norm, 0.1"):
        secure_round(begin(s, initial(s)), s, Crowd())


def test_an_answer_that_is_nonsense_costs_its_sender_alone() -> None:
    def nonsense(step: str, answer: Answer) -> Answer:
        return Answer(answer.client, {"keys": 7}) if answer.client == "c03" else answer

    s = settings("fedex", 4)
    _, record = secure_round(begin(s, initial(s)), s, Crowd(forged=nonsense))
    assert "sent what cannot be used" in record["refused"]["c03"]


def test_no_secret_is_in_what_a_client_sends_or_shows() -> None:
    s, crowd = settings("fedex", 3), Crowd()
    secure_round(begin(s, initial(s)), s, crowd)
    for client, kept in crowd.kept.items():
        for session in kept["sessions"].values():
            sent = "".join(str(a.about) for _, a in crowd.seen if a.client == client)
            assert session["mask_key"] not in sent and session["seed"] not in sent
            assert session["seed"] not in repr(kept["name"])
