"""What a plan says of sums is what rounds come to."""

from __future__ import annotations

import pytest
from crowd import Crowd, initial, settings
from test_secure_rounds import FIT

from fedex_lora.errors import UserError
from fedex_lora.experiments.cost.cost import costs, shapes
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.state import begin
from fedex_lora.model.architectures import count
from fedex_lora.recipe import LoraSpec
from fedex_lora.runs.plan.traffic import DryRun

# what their sum's factors have as rank depends on its numbers, or on who is sent what
OPEN = ("fedex-hetero", "fedmomentum", "florist")


@pytest.mark.parametrize("method", FIT)
def test_the_bytes_of_every_method(method: str) -> None:
    s, ranks = settings(method, 3), {}
    if method == "flexlora":
        ranks = {"c00": 1, "c01": 4, "c02": 2}
        s = settings(method, 3, ranks=ranks)
    first = initial(s)
    state, run = begin(s, first), DryRun(s, {name: t.shape for name, t in first.head.items()})
    for _ in range(3):
        up, down = run.round()
        state, record = secure_round(state, s, Crowd())
        assert {client: size.bytes for client, size in up.items()} == record["bytes_up"]
        for client, size in down.items():  # exponents have two or three digits, or none
            off = abs(size.bytes - record["bytes_down"][client])
            assert off < (0.35 * size.bytes if method in OPEN else 100), client


def test_many_clients_and_a_dense_sum_cost_each_of_them_no_more() -> None:
    s = settings("fedex", 40)
    _, record = secure_round(begin(s, initial(s)), s, Crowd())
    up, _ = DryRun(s, {"w": initial(s).head["w"].shape}).round()
    for client, size in up.items():
        assert size.bytes == record["bytes_up"][client]
    assert up["c00"].numbers < 2 * (46 * 57 + 24 * 20)  # dense, the means, the head, the loss


def test_cost_of_sums_by_hand() -> None:
    model = shapes("roberta-base", LoraSpec(r=4, target_modules=["query"]), None)
    (plain,), (fedex,), (fedit,) = (
        costs(model, [name], clients=3, rounds=1, secure=secure)
        for name, secure in (("fedit", False), ("fedex", True), ("fedit", True))
    )
    head = count(model.adapted.head.values())
    factors = plain.up.numbers  # of three clients: 12 layers, A and B of 768 × 4
    assert factors - 3 * head == 3 * 12 * 2 * 4 * 768
    assert fedit.up.numbers == factors + 3 * 3  # n, loss, whether there is one
    sketches = 12 * 768 * (12 + 12 + 8)  # of rank k·r = 12, and 8 rows more on one side
    assert fedex.up.numbers == fedit.up.numbers + 3 * sketches
    with pytest.raises(UserError, match="local exchanges nothing"):
        costs(model, ["local"], clients=3, rounds=1, secure=True)
