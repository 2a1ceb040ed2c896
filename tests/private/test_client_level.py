"""Client-level privacy: the noised mean against its equation, the bound, the account."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_runs import StopAfter, recipe

from fedex_lora import Server
from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.engines.private.account import Steps, epsilon
from fedex_lora.engines.private.plan import client_rounds
from fedex_lora.engines.transforms import clip
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import flat, norm_of
from fedex_lora.federation.noise import MeanNoise, count_within, next_bound, split
from fedex_lora.federation.randomness import normal, rehearsed
from fedex_lora.recipe.privacy import ClientLevel
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir

LEVEL = {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3}


class Given:
    def __init__(self, updates: dict[str, Any]) -> None:
        self.updates = updates

    def train(self, exchange: Any) -> Any:
        yield from (self.updates[client] for client in exchange.clients if client in self.updates)

    def evaluate(self, exchange: Any) -> Any:
        yield from ()


@pytest.mark.parametrize("method", ["fedit", "ffa", "fedsvd"])
def test_the_mean_is_noised_once_and_over_the_clients_that_were_asked(method: str) -> None:
    """Two of three came: B moves by (d₁ + d₂ + noise)/3; of fedsvd the product B·A does. What is
    longer than the bound counts as long as that."""
    layers = {"q": LayerShape(out=5, inp=4, rank=2, scale=2.0)}
    server = Server(method, layers, ["a", "b", "c"], weights="uniform", min_clients=1)
    state, g = server.init(), torch.Generator().manual_seed(1)
    updates, drifts = {}, []
    for client in "ab":
        end = server.start(state, client)
        drifts.append(0.3 * torch.randn(5, 2, generator=g))
        end.layers["q"].B.add_(drifts[-1], alpha=2 if client == "a" else 1)
        updates[client] = server.update(state, client, end, examples=7)
    bound = drifts[0].norm().item()
    assert drifts[1].norm() < bound
    noise = MeanNoise(bound, 0.5, 3, rehearsed(4))
    after, _ = run_round(state, server.settings, Given(updates), noise=noise)
    bits, names = rehearsed(4), sorted(updates["a"].tensors)
    drawn = {name: 0.5 * normal(bits, updates["a"].tensors[name]).double() for name in names}
    expected = sum(d.double() for d in drifts) + drawn["B/q"]
    start, found = state.factors["q"], after.factors["q"]
    if method == "fedsvd":
        product = expected / 3 @ start.A.double()
        assert torch.allclose(found.B.double() @ found.A.double(), product, atol=1e-6)
    else:
        assert torch.allclose(found.B.double(), start.B.double() + expected / 3, atol=1e-6)
    if method == "fedit":
        assert torch.allclose(found.A.double(), start.A + drawn["A/q"] / 3, atol=1e-6)


def test_an_update_that_was_clipped_is_taken_however_small_the_bound() -> None:
    """Entries near 1 are rounded by up to 6e-8, in sum by more than 1e-5 of the bound."""
    g = torch.Generator().manual_seed(1)
    layers = {"q": LayerShape(out=500, inp=1000, rank=2, scale=2.0)}
    server = Server("fedit", layers, ["a", "b"], max_norm=1e-5, min_clients=1)
    a = torch.randn(2, 1000, generator=g)
    first = AdapterState({"q": Factors(a, torch.zeros(500, 2), 2.0)})
    state, updates = server.init(first), {}
    for client, most in (("a", 1e-5), ("b", 2e-4)):
        end = server.start(state, client)
        drift = {name: torch.randn(t.shape, generator=g) for name, t in flat(end).items()}
        for name, moved in clip(most)(drift, None).items():  # type: ignore[arg-type]
            flat(end)[name].add_(moved)
        updates[client] = server.update(state, client, end, examples=7)
    apart = (updates["a"].tensors[name] - t for name, t in flat(server.start(state, "a")).items())
    assert norm_of(apart) > 1e-5 * (1 + 1e-3)
    _, record = run_round(state, server.settings, Given(updates))
    assert [*record["clients"]] == ["a"] and "changed by 0.0002" in record["refused"]["b"]


def test_a_bound_does_not_run_away() -> None:
    assert next_bound(1.0, 1e9, 3, 0.5, 0.2) == 1e-9
    assert next_bound(1.0, -1e9, 3, 0.5, 0.2) == 1e9
    assert next_bound(2.0, 1.5, 3, 0.5, 0.2) == 2.0 * math.exp(-0.1)


def test_the_noise_of_the_bound_is_paid_by_that_of_the_mean() -> None:
    of_sum, of_count = split(1.1, 400)
    assert of_count == 20
    both = epsilon([Steps(of_sum, 1.0, 1), Steps(2 * of_count, 1.0, 1)], 1e-5)
    assert both == pytest.approx(epsilon([Steps(1.1, 1.0, 1)], 1e-5), rel=3e-3)


def test_the_bound_goes_to_the_quantile_of_the_norms() -> None:
    """Andrew et al.: C·exp(−η(b − γ)); without noise it stays where the median is."""
    norms = [float(n) for n in range(1, 101)]

    def following(bound: float) -> float:
        within = count_within([min(n, bound) for n in norms], bound, 0.0)
        return next_bound(bound, within, 100, 0.5, 0.2)

    first = following(10.0)
    assert first == pytest.approx(10 * math.exp(-0.2 * (9 / 100 - 0.5)))
    bound = 10.0
    for _ in range(200):
        bound = following(bound)
    assert 49 < bound < 52


def test_clients_pay_for_the_rounds_that_they_are_asked_in() -> None:
    two = epsilon([Steps(2.0, 1.0, 2)], 1e-3)
    spec = ClientLevel(noise_multiplier=2.0, clip=1.0, delta=1e-3, epsilon=two * 1.01)
    assert client_rounds(spec, [["a", "b"]] * 5) == 2
    assert client_rounds(spec, [["a"], ["b"]] * 5) == 4
    tight = ClientLevel(noise_multiplier=0.1, clip=1.0, delta=1e-3, epsilon=1.0)
    with pytest.raises(UserError, match=r"client_level.epsilon: 1 allows no round"):
        client_rounds(tight, [["a"]])
    with pytest.raises(UserError, match=r"client_level.delta: 0.6 is above 1/2"):
        client_rounds(ClientLevel(noise_multiplier=1, clip=1, delta=0.6), [["a", "b"]])


def made(folder: Path, **blocks: Any) -> Any:
    given = {"method": {"name": "ffa"}, "federation": {"weights": "uniform", "rounds": 2}}
    given["privacy"] = {"client_level": {**LEVEL, "adaptive": True}, "rehearsal": True}
    return recipe(folder, **{**given, **blocks})


def test_a_run_is_resumed_with_its_bound_and_its_account_and_tells_nothing_of_single_updates(
    tmp_path: Path,
) -> None:
    whole = start_run(made(tmp_path), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start_run(made(tmp_path), tmp_path / "cut", StopAfter(1))
    resumed = resume_run(tmp_path / "cut")
    assert resumed["privacy"] == whole["privacy"] and resumed["best"] == whole["best"]
    first, second = RunDir(tmp_path / "cut").records()
    assert first["privacy"]["clip"] == 0.01
    assert second["privacy"]["clip"] == first["privacy"]["next_clip"] != 0.01
    for record in (first, second):
        assert not {"norms", "median_norm", "deviation", "deviation_by_layer"} & record.keys()
        assert set(record["clients"]["ann"]) == {"examples", "steps", "seconds"}
        spent = [Steps(0.8, 1.0, record["round"])]
        assert record["privacy"]["epsilon"]["ann"] == epsilon(spent, 1e-3)
    assert not second["refused"]


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"method": {"name": "fedex"}}, r"method.name: fedex publishes more .* fedit, ffa"),
        ({"federation": {"weights": "examples"}}, "set uniform"),
        (
            {"federation": {"mean": "median", "liars": 1, "min_clients": 3, "weights": "uniform"}},
            "federation.mean: the noise is on the weighted mean, which median is not",
        ),
        (
            {"federation": {"align": True, "weights": "uniform"}},
            "federation.align: what is rotated may be larger than the bound",
        ),
        ({"evaluation": {"where": "both"}}, "evaluation.where"),
        ({"records": {"save_updates": True}}, "records.save_updates"),
        (
            {"privacy": {"client_level": LEVEL, "example_level": {"epsilon": 1, "delta": 1e-3}}},
            "hide different things",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    tmp_path: Path, blocks: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        made(tmp_path, **blocks)
