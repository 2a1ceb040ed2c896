"""What is read from run directories, whole and broken."""

import json
import shutil

import pytest
from made_up import made_up, spec

from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.runs import head_numbers, read_run, read_runs, site_shapes
from fedex_lora.experiments.analysis.study import study
from fedex_lora.runs.checkpoint import latest
from fedex_lora.runs.rundir import RunDir


def lines(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_finished_run_has_no_notes(tmp_path):
    run = read_run(made_up(tmp_path / "run", spec()))
    assert run.finished and run.notes == () and [r["round"] for r in run.records] == [1, 2, 3]
    assert run.bytes_by_round() == [600, 600, 600]


def test_missing_rounds_and_an_unfinished_run_are_noted(tmp_path):
    run = read_run(made_up(tmp_path / "run", spec(federation={"rounds": 9}), None, rounds=(1, 4)))
    assert run.notes == ("no record of round 2, 3", "unfinished: 4 of 9 rounds")


@pytest.mark.parametrize("kept", [True, False])
def test_an_empty_run(tmp_path, kept):
    path = made_up(tmp_path / "run", spec(), None, rounds=())
    if not kept:
        (path / "metrics.jsonl").unlink()
    assert read_run(path).notes == ("no round is recorded yet",)


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe", b"[1]", b'{"round": "x"}', b'{"round": 2}'])
def test_a_damaged_line_is_named_and_left_out(tmp_path, bad):
    path = made_up(tmp_path / "run", spec())
    good = lines(path)
    (path / "metrics.jsonl").write_bytes(b"\n".join([good[0].encode(), bad, good[2].encode()]))
    run = read_run(path)
    assert [r["round"] for r in run.records] == [1, 3]
    assert "line 2 is damaged" in run.notes[0] and "round 2" in run.notes[1]


@pytest.mark.parametrize("bad", ["{", "[]", '{"best": 3}', '{"best": {"scores": {}}}'])
def test_damaged_results_make_a_run_unfinished(tmp_path, bad):
    path = made_up(tmp_path / "run", spec())
    (path / "results.json").write_text(bad)
    run = read_run(path)
    assert not run.finished and run.notes


def test_directories_of_runs_are_searched_and_each_run_read_once(tmp_path):
    for seed in (0, 1):
        made_up(tmp_path / "grid" / f"fedex-seed{seed}", spec(seed=seed))
    (tmp_path / "grid" / "report-plots").mkdir()
    bad = made_up(tmp_path / "grid" / "bad", spec(seed=2))
    (bad / "recipe.yaml").write_text("method: {name: nonsense}")
    paths = [tmp_path / "grid", tmp_path / "grid" / "fedex-seed0", tmp_path / "absent"]
    runs, problems = read_runs(paths)
    assert [r.recipe.seed for r in runs] == [0, 1]
    assert len(problems) == 2 and "bad: left out" in problems[0] and "absent" in problems[1]


@pytest.mark.parametrize("what", ["absent", "empty", "a file"])
def test_without_any_run_it_says_what_to_name(tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "a file":
        path.write_text("x")
    with pytest.raises(UserError, match="no run there"):
        read_runs([path])


def test_runs_of_other_data_are_tasks_of_their_own(tmp_path):
    made_up(tmp_path / "a", spec(seed=0))
    made_up(tmp_path / "b", spec(seed=1), rows=99)
    made_up(tmp_path / "c", spec(seed=0, task={"name": "qnli"}))
    found = study(read_runs([tmp_path])[0])
    assert found.tasks == ["sst2", "sst2 [2]", "qnli"]
    assert "3 different tasks" in found.notes[0] and "train: 99 rows" in found.notes[0]


def test_arms_are_named_after_what_varies(tmp_path):
    made_up(tmp_path / "a", spec())
    made_up(tmp_path / "b", spec("ffa", lora={"r": 8}))
    made_up(tmp_path / "c", spec("fedex-svd", method={"rank": 2, "carry": False}))
    made_up(tmp_path / "d", spec("fedex", seed=1, engine={"threads": 2}, name="other"))
    made_up(tmp_path / "e", spec())
    found = study(read_runs([tmp_path])[0])
    assert found.arms == ["ffa, r 8", "fedex, r 4", "fedex-svd:2 without carry, r 4"]
    assert found.reference == "fedex" and found.main_arm("sst2") == "fedex, r 4"
    assert [p.seed for p in found.of(arm="fedex, r 4")] == [0, 1]
    assert len(found.notes) == 1 and "repeats" in found.notes[0]


def test_shapes_come_from_headers(small_run, tmp_path):
    """Of the checkpoint, or else of the exported adapter; the head from the checkpoint alone."""
    path, model = small_run
    expected = {name: (site.out, site.inp) for name, site in model.layers.items()}
    assert site_shapes(path) == expected
    _, state, _ = next(iter(_states(path)))
    assert head_numbers(path) == sum(t.numel() for t in state.head.values()) > 0
    copy = tmp_path / "copy"
    shutil.copytree(path / "final", copy / "final")
    assert site_shapes(copy) == expected
    assert site_shapes(tmp_path) == {} and head_numbers(tmp_path) == 0


def _states(path):

    return latest(RunDir(path).checkpoints)


def test_the_description_of_an_unfinished_run_comes_from_its_checkpoint(small_run, tmp_path):
    path, _ = small_run
    copy = shutil.copytree(path, tmp_path / "copy")
    said = json.loads((copy / "results.json").read_text())["description"]
    (copy / "results.json").unlink()
    assert read_run(copy).description == said
