"""What the benchmark of peers calls a mean, and what it makes of its measurements."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers.common import Ended, effective
from benchmarks.peers.row import CHORUS, FLOWER, OURS, PLAIN, shown
from benchmarks.timing import Times


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"query": torch.tensor([[value, 0.0]], dtype=torch.float64)}


def test_how_far_off_is_relative_to_how_far_the_weighted_mean_moved():
    ended = Ended(
        start=weights(1.0),
        ends=[weights(2.0), weights(5.0)],
        rows=[1, 3],
        got={"mean": weights(4.25), "half way": weights(2.625), "unweighted": weights(3.5)},
    )
    assert ended.wrong() == pytest.approx({"mean": 0, "half way": 0.5, "unweighted": 0.75 / 3.25})


@pytest.mark.parametrize("inner", ["", ".default"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_effective_weight_of_an_adapters_names(prefix: str, inner: str):
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]])
    name = f"{prefix}layer.0.query"
    state = {f"{name}.lora_A{inner}.weight": a, f"{name}.lora_B{inner}.weight": b}
    base = torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    found = effective({"layer.0.query": base}, {**state, "head": a}, 0.5)
    assert list(found) == ["layer.0.query"]
    right = torch.tensor([[2.5, 3.0], [2.0, 5.0], [2.5, 5.0]], dtype=torch.float64)
    assert torch.equal(found["layer.0.query"], right)


def test_peers_are_shown_as_ratios_to_ours_and_a_missing_one_is_named():
    cpu = {OURS: Times((2.0, 2.0)), PLAIN: Times((4.0, 4.0)), FLOWER: Times((6.0, 10.0))}
    clock = {OURS: Times((1.0, 1.0)), PLAIN: Times((1.0, 1.0)), FLOWER: Times((0.5, 0.5))}
    row = shown(cpu, clock, {FLOWER: 0.25})
    figures = {figure.what: figure for figure in row.figures}
    over = figures[f"CPU seconds, {FLOWER} over {OURS}"]
    assert (over.value, over.unit, over.spread, over.reached) == (4.0, "×", 0.5, True)
    assert figures[f"CPU seconds, {FLOWER} over {PLAIN}"].value == 2.0
    assert figures[f"time, {FLOWER} over {OURS}"].value == 0.5
    assert figures[f"how far off, {FLOWER}"].value == 0.25
    assert "chorus was not measured" in row.notes[-1]
    assert (
        "chorus was not measured"
        not in shown({**cpu, CHORUS: cpu[OURS]}, {**clock, CHORUS: clock[OURS]}, {}).notes[-1]
    )
