"""Truncation, stacking and scores by setting."""

import pytest
from made_up import grid, made_up, spec
from safetensors.torch import load_file

from fedex_lora.experiments.analysis.drawn import fewer_runs
from fedex_lora.experiments.analysis.figures import score_by_bytes
from fedex_lora.experiments.analysis.figures_deviation import deviation_by_round
from fedex_lora.experiments.analysis.figures_tradeoff import ranks
from fedex_lora.experiments.analysis.runs import read_run, read_runs
from fedex_lora.experiments.analysis.scores import (
    against_reference,
    arm_scores,
    bytes_ratio,
    comparisons,
    differences,
    scores_by,
)
from fedex_lora.experiments.analysis.stacking import stacked, stacked_like
from fedex_lora.experiments.analysis.study import study
from fedex_lora.experiments.analysis.truncation import cut_points


def cut(folder):
    """Plain and exact averaging, and the residual cut to some ranks; 3 clients, r = 4."""
    for seed in (0, 1):
        for rank, carry in ((1, False), (3, False), (1, True)):
            one = spec("fedex-svd", seed=seed, method={"rank": rank, "carry": carry})
            made_up(folder / f"{rank}-{carry}-{seed}", one, 0.5 + 0.1 * rank, down=100 + 10 * rank)
    grid(folder, {"fedit": [0.5, 0.5], "fedex": [0.9, 0.8]})
    return study(read_runs([folder])[0])


def drawn(made):
    return [text.get_text() for legend in made.figure.legends for text in legend.get_texts()]


def test_pooled_data_are_no_federation_whose_bytes_are_drawn(tmp_path):
    grid(tmp_path, {m: [0.5, 0.6] for m in ("fedit", "fedex", "centralized")})
    found = study(read_runs([tmp_path])[0])
    assert drawn(score_by_bytes(found, "sst2")) == ["fedit", "fedex"]


@pytest.mark.parametrize("seeds, banded", [(2, False), (3, True)])
def test_intervals_of_two_seeds_do_not_hide_the_scores_by_rank(tmp_path, seeds, banded):
    for r in (1, 4):
        scores = [0.5 + 0.01 * seed for seed in range(seeds)]
        grid(tmp_path / str(r), {"fedex": scores}, lora={"r": r})
    made = ranks(study(read_runs([tmp_path])[0]), "sst2")
    assert bool(made.figure.axes[0].collections) == banded == ("Bands" in made.caption)


def test_the_curve_goes_from_averaging_to_the_whole_residual(tmp_path):
    points = cut_points(cut(tmp_path), "sst2")
    assert [(p.rank, p.arm, p.left_out) for p in points if not p.curve] == [
        (0, "fedit", 1.0),
        (8, "fedex", 0.0),
    ]
    without = [p for p in points if p.curve == "without carry"]
    assert [p.rank for p in without] == [1, 3]
    # made up as 1 / (1 + r'), but for the last round, which is sent whole
    assert [p.left_out for p in without] == pytest.approx([1 / 2, 1 / 4])
    assert [p.bytes_down for p in without] == [3 * 4 * 110, 3 * 4 * 130]
    assert [p.score for p in without] == pytest.approx([0.6, 0.8])
    assert [(p.rank, p.seeds) for p in points if p.curve == "with carry"] == [(1, 2)]
    assert points[-1].score == pytest.approx(0.85)


def test_the_curve_is_of_finished_runs_with_equal_seeds(tmp_path):
    """Else a rank of which one good seed is done looks the best, and cheaper than nothing."""
    grid(tmp_path, {"fedit": [0.9, 0.1], "fedex": [0.9, 0.3]})
    made_up(tmp_path / "a", spec("fedex-svd", seed=0, method={"rank": 2}), 0.9, down=120)
    unfinished = spec("fedex-svd", seed=1, method={"rank": 2})
    made_up(tmp_path / "b", unfinished, None, rounds=(1,), down=120)
    placed = study(read_runs([tmp_path])[0])
    points = cut_points(placed, "sst2")
    assert [(p.rank, p.score, p.seeds) for p in points] == [(0, 0.9, 1), (2, 0.9, 1), (8, 0.9, 1)]
    assert [p.bytes_down for p in points] == [3 * 4 * 100, 3 * 4 * 120, 3 * 4 * 150]
    assert fewer_runs(placed, "sst2") == "Of fewer than 2 seeds: fedex-svd:2 (1)."


def test_scores_by_rank_are_drawn_of_what_ran_at_several(tmp_path):
    grid(tmp_path / "a", {"fedex": [0.9], "ffa": [0.5]})
    assert ranks(study(read_runs([tmp_path])[0]), "sst2") is None
    grid(tmp_path / "b", {"ffa": [0.6]}, lora={"r": 8})
    drawn = ranks(study(read_runs([tmp_path])[0]), "sst2")
    assert drawn is not None
    (line,) = drawn.figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [4, 8] and list(line.get_ydata()) == [0.5, 0.6]


def test_deviations_of_other_sizes_are_drawn_on_a_log_axis(tmp_path):
    """fedex-keep's grows a hundredfold: on a plain axis all others would lie on the ground."""
    grid(tmp_path, {"fedex": [0.9]})
    plain = deviation_by_round(study(read_runs([tmp_path])[0]), "sst2")
    assert plain is not None and plain.figure.axes[0].get_yscale() == "linear"
    made_up(tmp_path / "k", spec("fedex-keep"), by_site=lambda site, round: 10.0**round)
    wide = deviation_by_round(study(read_runs([tmp_path])[0]), "sst2")
    assert wide is not None and wide.figure.axes[0].get_yscale() == "log"


def test_without_a_cut_residual_there_is_no_curve(tmp_path):
    grid(tmp_path, {"fedit": [0.5], "fedex": [0.6]})
    assert cut_points(study(read_runs([tmp_path])[0]), "sst2") == []


def test_stacking_multiplies_rank_and_bytes(small_run):
    """Against counting by hand: k clients, r·k^(t−1) a round, up, and from round 2 on down."""
    rounds = stacked([(6, 4), (5, 5)], rank=2, clients=3, rounds=3, head=7)
    assert [s.rank for s in rounds] == [2, 6, 18]
    assert [s.full for s in rounds] == [False, True, True]
    assert [s.bytes for s in rounds] == [
        4 * 3 * (2 * 20 + 7),
        4 * 3 * 2 * (6 * 20 + 7),
        4 * 3 * 2 * (18 * 20 + 7),
    ]
    path, _ = small_run
    tensors = load_file(path / "rounds/0001/clients/ann/adapter_model.safetensors")
    # the first round is as any other method's: every client sends its factors and head
    assert stacked_like(read_run(path))[0].bytes == 3 * 4 * sum(t.numel() for t in tensors.values())


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
    (one,) = comparisons(placed)
    assert (one.ours, one.reference) == ("fedit", "fedex")
    mean = -((0.1 + 0.1 + 0.2) / 3 + (0.2 + 0.1 + 0.1) / 3) / 2
    assert one.difference.mean == pytest.approx(mean) and one.difference.seeds == 3
    found = {p.ours: p.difference for p in comparisons(placed, "sst2")}
    assert found["ffa"].mean == pytest.approx(-0.7) and found["ffa"].seeds == 2


def test_methods_are_compared_at_equal_settings_and_a_seed_counts_once(tmp_path):
    for r, gain in ((1, 0.1), (8, 0.3)):
        lora = {"r": r, "lora_alpha": 2.0 * r}
        scores = {"fedex": [0.5 + gain, 0.6 + gain], "fedit": [0.5, 0.6], "ffa": [0.1, 0.2]}
        grid(tmp_path / str(r), scores, lora=lora)
    placed = study(read_runs([tmp_path])[0])
    assert placed.arms[:2] == ["fedit, r 1", "fedit, r 8"]  # α follows r and is not named
    found = {p.ours: p.difference for p in comparisons(placed)}
    assert found["fedit"].mean == pytest.approx(-0.2) and found["fedit"].seeds == 2
    one = against_reference(placed, "fedit, r 8")
    assert one.reference == "fedex" and one.difference.mean == pytest.approx(-0.3)
    assert against_reference(placed, "fedex, r 8") is None
    facets = placed.facets("sst2")
    assert list(facets) == ["r 1", "r 8"] and len(facets["r 8"].placed) == 6


def test_what_ran_at_further_settings_is_compared_with_the_reference_s_one_arm(tmp_path):
    """ffa at twice the rank, among methods of one rank."""
    grid(tmp_path / "a", {"fedex": [0.9, 0.8], "fedit": [0.8, 0.8], "ffa": [0.5, 0.6]})
    grid(tmp_path / "b", {"ffa": [0.7, 0.7]}, lora={"r": 8})
    placed = study(read_runs([tmp_path])[0])
    found = {p.ours: p.difference.mean for p in comparisons(placed)}
    assert found == pytest.approx({"fedit, r 4": -0.05, "ffa, r 4": -0.3, "ffa, r 8": -0.15})
    assert [placed.in_short(p) for p in placed.arms] == ["fedit", "ffa, r 4", "ffa, r 8", "fedex"]
    assert placed.first == "fedex, r 4" and against_reference(placed, "fedex, r 4") is None
    assert bytes_ratio(placed, "ffa, r 8", "sst2") is not None


def test_what_is_tuned_for_each_method_does_not_keep_them_apart(tmp_path):
    """ffa with a learning rate and a rank of its own; claims about equal ranks still need those."""
    grid(tmp_path / "a", {"fedex": [0.9, 0.8]}, training={"learning_rate": 1e-3}, lora={"r": 4})
    grid(tmp_path / "b", {"ffa": [0.5, 0.5]}, training={"learning_rate": 5e-3}, lora={"r": 8})
    placed = study(read_runs([tmp_path])[0])
    (one,) = comparisons(placed)
    assert one.ours == "ffa" and one.difference.mean == pytest.approx(-0.35)
    assert placed.arms == ["ffa, r 8, learning_rate 0.005", "fedex, r 4, learning_rate 0.001"]
    ours, other = (lambda p: p.label == "fedex"), (lambda p: p.label == "ffa")
    assert differences(placed, ours, other) == {}
    assert list(differences(placed, ours, other, factor={"lora.r": 0.5})) == ["sst2"]


def test_runs_of_one_method_are_compared_with_the_first_arm(tmp_path):
    for r, score in ((1, 0.5), (8, 0.7), (32, 0.6)):
        grid(tmp_path / str(r), {"fedex": [score, score + 0.1]}, lora={"r": r})
    found = {p.ours: p.difference.mean for p in comparisons(study(read_runs([tmp_path])[0]))}
    assert found == pytest.approx({"fedex, r 8": 0.2, "fedex, r 32": 0.1})


def test_unfinished_runs_are_counted_but_not_scored(tmp_path):
    made_up(tmp_path / "a", spec(seed=0), 0.7)
    made_up(tmp_path / "b", spec(seed=1), None, rounds=(1,))
    (row,) = arm_scores(study(read_runs([tmp_path])[0]), "sst2")
    assert row.seeds == (0, 1) and row.unfinished == (1,)
    assert row.by_split["test"] == [0.7] and row.seconds == [3.0]
