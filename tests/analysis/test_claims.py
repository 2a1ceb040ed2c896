"""Every claim of the paper, against runs made so that it holds, fails or cannot be told."""

import pytest
from made_up import grid, made_up, spec

from fedex_lora.experiments.analysis.claims import CLAIMS
from fedex_lora.experiments.analysis.evidence import findings
from fedex_lora.experiments.analysis.runs import read_runs
from fedex_lora.experiments.analysis.study import study

HIGH, LOW, WILD = [0.90, 0.91, 0.92], [0.80, 0.815, 0.82], [0.99, 0.7, 0.95]


def outcomes(folder, claim):
    found = findings(study(read_runs([folder])[0]))
    return {f.part: f.outcome for f in found if f.claim == claim}


def test_every_claim_is_told_something(tmp_path):
    made_up(tmp_path / "run", spec("local"))
    found = findings(study(read_runs([tmp_path])[0]))
    assert {f.claim for f in found} == {c.number for c in CLAIMS} == set(range(1, 7))
    assert {f.outcome for f in found} == {"not tested"}
    assert all(c.command.startswith("fedex-lora ") for c in CLAIMS)


@pytest.mark.parametrize(
    ("fedex", "fedit", "expected"),
    [(HIGH, LOW, "holds"), (LOW, HIGH, "does not hold"), (WILD, LOW, "not seen")],
)
def test_claim_1_by_intervals(tmp_path, fedex, fedit, expected):
    grid(tmp_path, {"fedex": fedex, "fedit": fedit})
    found = outcomes(tmp_path, 1)
    assert found["fedex scores higher than fedit"] == expected
    assert found["fedit scores higher than ffa"] == "not tested"


def test_one_seed_shows_nothing(tmp_path):
    grid(tmp_path, {"fedex": [0.9], "fedit": [0.1]})
    assert outcomes(tmp_path, 1)["fedex scores higher than fedit"] == "not seen"


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, "holds"), (0.2, "does not hold"), (0.008, "not seen")]
)
def test_claim_1_near_centralized(tmp_path, gap, expected):
    wobble = [0.001, -0.002, 0.001] if gap != 0.008 else [0.02, -0.02, 0.0]
    fedex = [c - gap + w for c, w in zip(HIGH, wobble)]
    grid(tmp_path, {"fedex": fedex, "centralized": HIGH})
    assert outcomes(tmp_path, 1)["fedex is at most 0.01 below centralized"] == expected


def test_claim_2_pairs_a_rank_with_twice_the_rank(tmp_path):
    grid(tmp_path / "a", {"fedit": HIGH, "fedex": HIGH}, lora={"r": 4})
    grid(tmp_path / "b", {"ffa": LOW}, lora={"r": 8, "lora_alpha": 16})
    found = outcomes(tmp_path, 2)
    assert set(found.values()) == {"holds"}
    grid(tmp_path / "c", {"ffa": LOW}, lora={"r": 4})
    assert outcomes(tmp_path / "c", 2)["fedit scores higher than ffa with twice its rank"] == (
        "not tested"
    )


def test_claim_3(tmp_path):
    grid(tmp_path, {"fedex": HIGH, "fedex-keep": LOW, "fedex-reinit": WILD})
    assert outcomes(tmp_path, 3) == {
        "fedex scores higher than fedex-reinit": "not seen",
        "fedex scores higher than fedex-keep": "holds",
    }


def by_site(sign, wobble):
    """Trends as the paper has them, or the other way round, by a factor that differs by seed."""

    def deviation(site, round):
        layer, kind = int(site.split(".")[2]), site.rpartition(".")[2]
        steep = sign * (1 + wobble)
        return 2.0 ** (steep * ((kind == "query") - layer - round))

    return deviation


@pytest.mark.parametrize(("sign", "expected"), [(1, "holds"), (-1, "does not hold")])
def test_claim_4_trends(tmp_path, sign, expected):
    for seed in range(3):
        deviation = by_site(sign, 0.1 * seed)
        made_up(tmp_path / f"{seed}", spec(seed=seed), by_site=deviation)
    found = outcomes(tmp_path, 4)
    assert found.pop("the deviation grows with local epochs (after round 1)") == "not tested"
    assert set(found.values()) == {expected} and len(found) == 3


def test_claim_4_epochs(tmp_path):
    for seed in range(3):
        for epochs in (3, 10):
            training, factor = {"num_train_epochs": epochs}, epochs * (1 + 0.05 * seed * epochs)
            one = spec(seed=seed, training=training)
            name = tmp_path / f"{seed}-{epochs}"
            made_up(name, one, by_site=lambda site, round, f=factor: f)
    assert outcomes(tmp_path, 4)["the deviation grows with local epochs (after round 1)"] == "holds"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1: LOW, 8: HIGH, 32: LOW[::-1]}, "holds"),
        ({1: LOW, 8: [0.70, 0.72, 0.71], 32: HIGH}, "does not hold"),
        ({1: LOW, 32: WILD}, "not seen"),
    ],
)
def test_claim_5(tmp_path, scores, expected):
    for r, values in scores.items():
        grid(tmp_path / str(r), {"fedex": values}, lora={"r": r})
    assert outcomes(tmp_path, 5)["a smaller rank scores higher than the largest"] == expected


def test_claim_5_holds_by_any_smaller_rank(tmp_path):
    """The best mean may be that of a rank which varies too much to say anything of it."""
    scores = {1: [0.60, 0.61, 0.62], 8: [0.30, 0.99, 0.99], 32: [0.50, 0.51, 0.53]}
    for r, values in scores.items():
        grid(tmp_path / str(r), {"fedex": values}, lora={"r": r})
    assert outcomes(tmp_path, 5)["a smaller rank scores higher than the largest"] == "holds"


def test_claim_6_counts_bytes_and_says_what_it_does_not_know(tmp_path):
    grid(tmp_path, {"fedex": [0.5], "fedit": [0.5]})
    found = [f for f in findings(study(read_runs([tmp_path])[0])) if f.claim == 6]
    # fedex: 900 up, 1800 down; fedit: 900 up, 1200 down
    assert found[0].outcome == "not seen" and "22.2 %" in found[0].evidence
    assert "not known here" in found[0].evidence


@pytest.mark.parametrize(("power", "expected"), [(1, "holds"), (2, "does not hold")])
def test_claim_6_growth(tmp_path, power, expected):
    for k in (2, 4, 8, 12):
        one = spec(federation={"clients": k})
        made_up(tmp_path / str(k), one, down=1000 + 500 * k**power)
    part = "bytes to a client grow linearly with the number of clients"
    assert outcomes(tmp_path, 6)[part] == expected
    # runs that differ in more than their clients are no point of that line
    other = spec(federation={"clients": 4}, lora={"r": 64})
    made_up(tmp_path / "other", other, down=10**6)
    assert outcomes(tmp_path, 6)[part] == expected
