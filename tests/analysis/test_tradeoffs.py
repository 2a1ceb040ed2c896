"""Truncation, stacking and scores by setting."""

import pytest
import torch
from made_up import grid, made_up, spec
from safetensors.torch import load_file
from small_runs import recipe
from test_deviation import products

from fedex_lora.analysis.runs import read_run, read_runs, site_shapes
from fedex_lora.analysis.scores import arm_scores, differences, paired, scores_by
from fedex_lora.analysis.stacking import stacked, stacked_like
from fedex_lora.analysis.study import study
from fedex_lora.analysis.truncation import cut_points, left_out
from fedex_lora.run import start_run


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Plain and exact averaging, and the residual cut to some ranks; 3 clients, r = 3."""
    folder = tmp_path_factory.mktemp("cut")
    save = {"records": {"save_updates": True}, "federation": {"rounds": 3}}
    for rank, carry in ((0, False), (1, False), (4, False), (1, True), (6, True)):
        method = {"name": "fedex-svd", "rank": rank, "carry": carry}
        start_run(recipe(folder, method=method, **save), folder / "runs" / f"{rank}-{carry}")
    for name in ("fedit", "fedex"):
        one = recipe(folder, method={"name": name}, **save)
        start_run(one, folder / "runs" / name)
    return folder / "runs"


def test_what_is_left_out_is_the_tail_of_the_residual(cut):
    """Without carry, against the singular values of the residual in float64."""
    for rank in (0, 1, 4):
        record = read_run(cut / f"{rank}-False").records[0]
        tails, wholes = [], []
        for site in record["deviation_by_site"]:
            ideal, averaged = products(cut / f"{rank}-False" / "rounds" / "0001", site)
            values = torch.linalg.svdvals(ideal - averaged)
            tails.append(values[rank:].square().sum().item())
            wholes.append(values.square().sum().item())
        assert record["left_out"] == pytest.approx(sum(tails) ** 0.5, rel=1e-4)
        assert (sum(tails) < 0.9 * sum(wholes)) == (rank > 0)


def test_the_curve_goes_from_averaging_to_the_whole_residual(cut):
    points = cut_points(study(read_runs([cut])[0]), "tiny (text-classification)")
    assert [(p.rank, p.arm) for p in points if not p.curve] == [(0, "fedit"), (6, "fedex")]
    without = {p.rank: p for p in points if p.curve == "without carry"}
    assert without[0].left_out == pytest.approx(1)
    assert 1 > without[1].left_out > without[4].left_out > 0
    down = [without[rank].bytes_down for rank in (0, 1, 4)]
    assert down == sorted(down) and down[0] < down[-1]
    carried = {p.rank: p for p in points if p.curve == "with carry"}
    assert carried[6].left_out == pytest.approx(0, abs=1e-5)
    assert carried[1].left_out > without[1].left_out  # it waits, so it piles up
    assert left_out(read_run(cut / "fedit")) == 1 and left_out(read_run(cut / "fedex")) == 0


def test_without_a_cut_residual_there_is_no_curve(tmp_path):
    grid(tmp_path, {"fedit": [0.5], "fedex": [0.6]})
    assert cut_points(study(read_runs([tmp_path])[0]), "sst2") == []


def test_stacking_multiplies_rank_and_bytes(cut):
    """Against counting by hand: k clients, r·k^(t−1) a round, up, and from round 2 on down."""
    rounds = stacked([(6, 4), (5, 5)], rank=2, clients=3, rounds=3, head=7)
    assert [s.rank for s in rounds] == [2, 6, 18]
    assert [s.full for s in rounds] == [False, True, True]
    assert [s.bytes for s in rounds] == [
        4 * 3 * (2 * 20 + 7),
        4 * 3 * 2 * (6 * 20 + 7),
        4 * 3 * 2 * (18 * 20 + 7),
    ]
    run = read_run(cut / "fedex")
    measured = run.bytes_by_round()[0] - sum(run.records[0]["bytes_down"].values())
    headers = measured - stacked_like(run)[0].bytes
    assert 0 < headers < 3 * 3000  # the first round is the same: no residual yet
    tensors = load_file(cut / "fedex" / "rounds/0001/clients/ann/adapter_model.safetensors")
    assert stacked_like(run)[0].bytes == 3 * 4 * sum(t.numel() for t in tensors.values())
    assert set(site_shapes(cut / "fedex")) == set(run.records[0]["deviation_by_site"])


def test_scores_by_rank_keep_methods_apart_and_let_alpha_follow(tmp_path):
    for r, values in ((1, [0.5, 0.6]), (8, [0.7, 0.9])):
        lora = {"r": r, "lora_alpha": 2.0 * r}
        grid(tmp_path / f"{r}", {"fedex": values, "fedit": values}, lora=lora)
    groups = scores_by(study(read_runs([tmp_path])[0]), "lora.r")
    found = {(g.label, g.value): g.score.mean for g in groups}
    assert found == pytest.approx(
        {("fedit", 1): 0.55, ("fedit", 8): 0.8, ("fedex", 1): 0.55, ("fedex", 8): 0.8}
    )


def test_scores_by_method_are_table_4(tmp_path):
    grid(tmp_path, {"fedex": [0.9, 0.8], "fedex-keep": [0.7, 0.6], "fedex-reinit": [0.5, 0.5]})
    found = {
        g.value: g.score.mean for g in scores_by(study(read_runs([tmp_path])[0]), "method.name")
    }
    assert found == pytest.approx({"fedex": 0.85, "fedex-keep": 0.65, "fedex-reinit": 0.5})


def test_pairs_share_seed_and_settings(tmp_path):
    grid(tmp_path / "a", {"fedex": [0.9, 0.8], "fedit": [0.7]}, lora={"r": 1})
    grid(tmp_path / "b", {"fedex": [0.5]}, lora={"r": 2})
    placed = study(read_runs([tmp_path])[0])
    ours, others = (lambda name: lambda p: p.run.recipe.method.name == name)("fedex"), "fedit"
    found = differences(placed, ours, lambda p: p.run.recipe.method.name == others)
    assert found == {"sst2": [pytest.approx(0.2)]}


def test_arms_over_several_tasks_are_pooled_only_if_they_ran_in_all(tmp_path):
    grid(tmp_path / "a", {"fedex": [0.9, 0.8, 0.7], "fedit": [0.8, 0.7, 0.5], "ffa": [0.1, 0.2]})
    qnli = {"task": {"name": "qnli"}}
    grid(tmp_path / "b", {"fedex": [0.6, 0.5, 0.4], "fedit": [0.4, 0.4, 0.3]}, **qnli)
    placed = study(read_runs([tmp_path])[0])
    one = paired(placed, "fedex", "fedit")
    assert one.difference.mean == pytest.approx(((0.1 + 0.1 + 0.2) / 3 + (0.2 + 0.1 + 0.1) / 3) / 2)
    assert paired(placed, "fedex", "ffa") is None
    assert paired(placed, "fedex", "ffa", "sst2").difference.mean == pytest.approx(0.7)


def test_unfinished_runs_are_counted_but_not_scored(tmp_path):
    made_up(tmp_path / "a", spec(seed=0), 0.7)
    made_up(tmp_path / "b", spec(seed=1), None, rounds=(1,))
    (row,) = arm_scores(study(read_runs([tmp_path])[0]), "sst2")
    assert row.seeds == (0, 1) and row.unfinished == (1,)
    assert row.by_split["test"] == [0.7] and row.seconds == [3.0]
