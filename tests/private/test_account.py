"""ε of what was done, against the exact value where there is one."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedex_lora.engines.private.account import Accounts, Steps, added, epsilon, noise_for
from fedex_lora.engines.private.plan import Shape, plan, shape_of
from fedex_lora.errors import UserError
from fedex_lora.recipe.privacy import ExampleLevel


def exact(sigma: float, delta: float) -> float:
    """ε of one Gaussian mechanism: Balle and Wang, arXiv 1805.06530, theorem 8."""

    def excess(e: float) -> float:
        a, b = 1 / (2 * sigma), e * sigma
        return float(norm.cdf(a - b) - math.exp(e) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 0, 700))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sigma", "count"), [(1.0, 1), (0.7, 1), (0.06, 1), (4.0, 25), (30.0, 100)]
)
def test_without_sampling_steps_are_one_gaussian_mechanism(sigma: float, count: int) -> None:
    """So many steps at σ are one at σ/√count; ε is rounded upwards."""
    found = epsilon([Steps(sigma, 1.0, count)], 1e-5)
    expected = exact(sigma / math.sqrt(count), 1e-5)
    assert expected <= found <= 1.003 * expected


def test_sampling_lowers_it_and_steps_and_clients_add_up() -> None:
    one, all_rows = Steps(1.0, 0.01, 100), Steps(1.0, 1.0, 100)
    assert epsilon([one], 1e-5) < 0.02 * epsilon([all_rows], 1e-5)
    # Abadi et al. 2016, section 5.1: q = 0.01, σ = 4, 10,000 steps, δ = 1e-5: ε = 1.26 by the
    # moments accountant, which is not tight
    assert 0.9 < epsilon([Steps(4.0, 0.01, 10_000)], 1e-5) < 1.26
    two = epsilon([Steps(4.0, 0.01, 4_000), Steps(4.0, 0.01, 6_000)], 1e-5)
    assert two == pytest.approx(epsilon([Steps(4.0, 0.01, 10_000)], 1e-5), rel=2e-3)
    assert added([one], one) == (Steps(1.0, 0.01, 200),)
    assert epsilon([one, Steps(0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon([one, Steps(0.001, 0.1, 1)], 1e-5) == math.inf  # and needs no grid for it


def test_the_noise_is_the_least_that_keeps_to_the_budget() -> None:
    noise = noise_for(3.0, 1e-5, 0.05, 60)
    assert 0.99 * 3.0 < epsilon([Steps(noise, 0.05, 60)], 1e-5) <= 3.0
    with pytest.raises(UserError, match="allows no training"):
        noise_for(0.01, 1e-5, 0.5, 1_000_000)


def test_an_account_refuses_what_would_exceed_its_budget_and_stays_as_it_was() -> None:
    account = Accounts(1e-5, budget=2.0)
    step = Steps(2.0, 0.1, 10)
    spent = account.spend("ann", step)
    assert spent == epsilon([step], 1e-5) < 2.0
    with pytest.raises(UserError, match=r"ann: 1000 more steps.*the budget is 2"):
        account.spend("ann", Steps(2.0, 0.1, 1000))
    assert account.spent == {"ann": (step,)}
    assert account.told("bob") == 0.0


TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 2,
}


def test_a_turns_steps_and_batches() -> None:
    shape = shape_of(TRAINING)
    assert shape == Shape(12, 4, 2, -1)
    assert shape.steps(25) == 6  # two epochs of ⌈25/12⌉
    assert shape_of({**TRAINING, "max_steps": 5}).steps(25) == 5


def test_each_clients_own_rows_and_turns_give_its_noise() -> None:
    spec = ExampleLevel(epsilon=2.0, delta=1e-3)
    schedule = [["a", "b"], ["a"], ["a", "b"]]
    found = plan(spec, TRAINING, {"a": 100, "b": 400}, schedule)
    assert found.rounds == 3
    for client, rows, turns in (("a", 100, 3), ("b", 400, 2)):
        steps = turns * 2 * math.ceil(rows / 12)
        whole = epsilon([Steps(found.noise[client], 12 / rows, steps)], 1e-3)
        assert 0.98 * 2.0 < whole <= 2.0


def test_with_noise_given_the_last_round_that_fits_is_found() -> None:
    one = epsilon([Steps(1.2, 0.12, 18)], 1e-3)
    three = epsilon([Steps(1.2, 0.12, 54)], 1e-3)
    spec = ExampleLevel(epsilon=three * 1.001, delta=1e-3, noise_multiplier=1.2)
    schedule = [["a"]] * 10
    assert plan(spec, TRAINING, {"a": 100}, schedule).rounds == 3
    assert plan(spec, TRAINING, {"a": 100}, [["b"]] * 6 + schedule).rounds == 9
    tight = ExampleLevel(epsilon=one * 0.99, delta=1e-3, noise_multiplier=1.2)
    with pytest.raises(UserError, match=r"privacy.example_level.epsilon: .* allows no round"):
        plan(tight, TRAINING, {"a": 100}, schedule)


@pytest.mark.parametrize(
    ("delta", "rows", "told"),
    [(0.02, 100, "above 1/100"), (1e-3, 11, "12 rows are expected in a step")],
)
def test_what_no_account_can_be_given_of_is_refused(delta: float, rows: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(ExampleLevel(epsilon=2.0, delta=delta), TRAINING, {"a": rows}, [["a"]])
