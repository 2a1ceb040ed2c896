"""Grids: what a file says, what is run of it, and that one command can be given again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from small_runs import recipe

from fedex_lora.errors import UserError
from fedex_lora.experiments.grid import plan as planning
from fedex_lora.experiments.grid import work as working
from fedex_lora.experiments.grid.plan import due, left, plan, standing, told
from fedex_lora.experiments.grid.spec import is_grid
from fedex_lora.experiments.grid.table import tables, write_comparison
from fedex_lora.experiments.grid.work import work
from fedex_lora.recipe.reader import dump_recipe, load_recipe
from fedex_lora.runs.lock import interrupted_by_signals
from fedex_lora.runs.rundir import RunDir

GRID = """\
recipes: [tiny.yaml]
methods: [fedit, {name: ffa, label: ffa-2r, rank_factor: 2}, "fedex-svd:1"]
seeds: [0, 3]
set: {training.learning_rate: 0.5}
vary:
  lora.r: [1, 2]
  epochs:
    short: {training.num_train_epochs: 1, federation.rounds: 4}
    long: {training.num_train_epochs: 2}
columns: lora.r
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "tiny.yaml").write_text(dump_recipe(recipe(folder)))
    (folder / "grid.yaml").write_text(GRID)
    return folder


def written(folder, text):
    (folder / "other.yaml").write_text(text)
    return folder / "other.yaml"


def test_every_combination_is_a_run_with_its_own_settings(folder):
    found = plan(folder / "grid.yaml")
    assert len(found.runs) == 2 * 2 * 3 * 2
    by_name = {run.name: run.recipe for run in found.runs}
    short = by_name["tiny-r=2-short/ffa-2r-seed3"]
    assert (short.lora.r, short.seed, short.federation.rounds) == (4, 3, 4)
    assert (short.training["num_train_epochs"], short.training["learning_rate"]) == (1, 0.5)
    long = by_name["tiny-r=1-long/fedex-svd-1-seed0"]
    assert (long.method.name, long.method.rank, long.lora.r) == ("fedex-svd", 1, 1)
    assert (long.federation.rounds, long.training["num_train_epochs"]) == (2, 2)


def test_overrides_of_the_command_win_and_the_rank_factor_follows_them(folder):
    text = "recipes: [tiny.yaml]\nmethods: [{name: ffa, rank_factor: 3}]\nseeds: [0]\n"
    runs = plan(written(folder, text), ["lora.r=5", "federation.rounds=9"]).runs
    assert [(r.recipe.lora.r, r.recipe.federation.rounds) for r in runs] == [(15, 9)]


def test_methods_of_a_choice_are_measured_in_what_all_of_them_can_have(folder):
    def engines(methods: str, **options: str) -> list[tuple[object, object]]:
        options = {"engine.fuse": "auto", "engine.precision": "auto", **options}
        given = ", ".join(f"{key}: {value}" for key, value in options.items())
        text = f"recipes: [tiny.yaml]\nmethods: [{methods}]\nseeds: [0, 1]\nset: {{{given}}}\n"
        runs = plan(written(folder, text)).runs[::2]
        for run in runs:  # what starts the run says the same
            assert load_recipe(run.file, run.sets).engine == run.recipe.engine
        return [(run.recipe.engine.fuse, run.recipe.engine.precision) for run in runs]

    private = "privacy.example_level.epsilon: 8, privacy.example_level.delta: 0.01"
    assert engines("fedit, fedex, centralized") == [("auto", "auto")] * 3
    assert engines("fedit, fedex-keep, centralized") == [(1, "auto")] * 3
    assert engines(f"fedit, {{name: ffa, set: {{{private}}}}}") == [(1, "float32")] * 2
    assert engines("fedit, fedex-keep", **{"engine.fuse": "1"}) == [(1, "auto")] * 2


def test_local_copies_take_the_place_of_the_hub(folder, tmp_path):
    hub = "data: {name: nyu-mll/glue, config: rte, train_examples: 9}"
    text = f"name: r\nmodel: {{name: x}}\ntask: {{kind: glue, name: rte}}\n{hub}\n"
    (folder / "hub.yaml").write_text(text)
    grid = written(folder, "recipes: [hub.yaml]\nmethods: [fedit]\nseeds: [0]\n")
    (tmp_path / "rte").mkdir()
    data = plan(grid, data=tmp_path).runs[0].recipe.data
    assert (data.path, data.name, data.train_examples) == (tmp_path / "rte", None, 9)
    with pytest.raises(UserError, match="no directory"):
        plan(grid, data=tmp_path / "rte")


WRONG = {
    "methods: [fedt]": r"other.yaml:2: methods.0.name: .*did you mean 'fedit'",
    "methods: [fedex-svd]": "needs the rank",
    "methods: [fedex:3]": "only a truncated residual",
    "methods: [ffa, ffa]": "ffa is there twice",
    "methods: [{name: ffa, labl: x}]": r"methods.0.labl: unknown key; did you mean 'label'",
    "methods: [{name: ffa, rank_factor: two}]": "rank_factor: expected a valid integer",
    "methods: []": "methods: ",
    "metods: [ffa]": "did you mean 'methods'",
    "methods: [ffa]\nlora: {r: 3}": "keys of the recipe go under `set`",
    "methods: [ffa]\nset: {seed: 3}": "other.yaml:3: set.seed: set by the grid's `seeds`",
    "methods: [ffa]\nvary: {lora.r: []}": r"vary.lora.r: expected a list of values",
    "methods: [ffa]\nvary: {e: {a b: {}}}": "a name of letters",
    "methods: [ffa]\nvary: {e: {a: 3}}": r"vary.e.a: expected what it sets",
    "methods: [ffa]\nvary: {lora.r: [1, 1]}": "r=1|1 is there twice",
    "methods: [ffa]\nvary: {lora.r: [1], e: {a: {lora.r: 2}}}": "lora.r is set by two",
    "methods: [{name: ffa, set: {lora.r: 8}}]\nvary: {lora.r: [1]}": "methods.0.set.lora.r: `vary`",
    "methods: [ffa]\nset: {lora.r: 8}\nvary: {lora.r: [1]}": "other.yaml:3: set.lora.r: `vary`",
    "methods: [{name: ffa, label: a b}, {name: ffa, label: a-b}]": "would be called tiny/a-b-seed0",
    "methods: [ffa]\nvary: {lora.rr: [1]}": "(?s)tiny-rr=1, ffa:.*lora.rr: unknown key",
    "methods: [ffa]\nset: {training.lerning_rate: 1}": "did you mean 'learning_rate'",
    "methods: [ffa]\ncolumns: task": "columns: expected one of recipe",
    "methods: [ffa]\nmethods: [ffa]": "given twice",
    "methods: [ffa]\nvary: {lora.r: [1]}\nchoose: [lora.rr]": "choose: expected .*mean 'lora.r'",
    "methods: [ffa]\nchoose: [recipe]": "choose: recipes differ in their data",
    "methods: [ffa]\nvary: {lora.r: [1]}\nchoose_at: {lora.r: 1}": "choose_at: there is nothing",
    "methods: [ffa]\nvary: {lora.r: [1]}\nchoose: [lora.r]\nchoose_at: {lora.r: 1}": "not an axis",
    "methods: [ffa]\nvary: {lora.r: [1, 2], training.max_steps: [3]}\nchoose: [lora.r]\n"
    "choose_at: {training.max_steps: 4}": "choose_at.training.max_steps: expected one of 3",
    "methods: [full, {name: ffa, rank_factor: 2, set: {lora.rank_pattern: {q: 2}}}]": "rank_factor",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(folder, text):
    file = written(folder, f"recipes: [tiny.yaml]\n{text}\n" + "seeds: [0]\n")
    with pytest.raises(UserError, match=WRONG[text]):
        plan(file)


def test_overrides_that_the_grid_settles_are_refused(folder):
    for text in ("seed=1", "method.name=ffa", "lora.r=3"):
        with pytest.raises(UserError, match="its own list"):
            plan(folder / "grid.yaml", [text])
    with pytest.raises(UserError, match="fits none of 24 runs"):
        plan(folder / "grid.yaml", only="nothing")


def test_grids_and_recipes_are_told_apart(folder):
    assert is_grid(folder / "grid.yaml") and not is_grid(folder / "tiny.yaml")
    with pytest.raises(UserError, match="this is a recipe"):
        plan(folder / "tiny.yaml")
    with pytest.raises(UserError, match="this is a grid"):
        planning.read_draft(folder / "grid.yaml")


def small(folder, methods="fedit, ffa, fedex", more=""):
    text = f"recipes: [tiny.yaml]\nmethods: [{methods}]\nseeds: [0, 1]\n{more}"
    return plan(written(folder, text))


def make_run(run, out, score=None, rounds=0, splits=True):
    """A run's directory, as it is after so many rounds, or finished with a score: of two splits, or
    of the clients' own rows."""
    directory = RunDir(out / run.name)
    directory.create(run.recipe)
    directory.write_records([{"round": n + 1} for n in range(rounds)])
    if score is None:
        return
    scores = {"validation": {"accuracy": score}, "test": {"accuracy": score / 2}}
    best = {"scores": scores if splits else {}, "score": score}
    sums = {"deviation": 0.1, "bytes_up": 3, "bytes_down": 4, "seconds": 5.0}
    about = {"method": run.recipe.method.name, "seed": run.seed, "metric": "accuracy"}
    directory.write_json("results.json", {**about, "best": best, **sums})


def test_done_and_begun_runs_are_known_and_other_recipes_are_never_touched(folder, tmp_path):
    new, begun, done, other, *_ = small(folder).runs
    make_run(begun, tmp_path, rounds=1)
    make_run(done, tmp_path, score=0.5)
    assert [standing(r, tmp_path) for r in (new, begun, done)] == ["new", "begun", "done"]
    assert [told(r, tmp_path) for r in (new, begun, done)] == ["-", "1 of 2", "done"]
    assert left([new, begun, done], tmp_path) == [new, begun]
    assert "--resume" in working.command(begun, tmp_path)
    assert "--resume" not in working.command(new, tmp_path)
    changed = plan(folder / "other.yaml", ["lora.lora_alpha=99"]).runs[3]
    make_run(changed, tmp_path)
    assert standing(other, tmp_path) == "other"
    with pytest.raises(UserError, match=r"lora.lora_alpha: 5.0 != 99.0.*`out`"):
        left(small(folder).runs, tmp_path)


def test_tables_are_means_over_seeds_and_tell_what_is_missing(folder, tmp_path):
    found = small(folder, "fedit, fedex", "vary: {lora.r: [1, 2]}\ncolumns: lora.r\n")
    for run, score in zip(found.runs, (0.2, 0.4, 0.6, 0.7, 0.9)):
        make_run(run, tmp_path, score)
    validation, test = tables(found, tmp_path)
    assert validation.header == ["method", "r=1", "r=2"] and "accuracy" in validation.title
    assert validation.rows == [
        ["fedit", "0.300 ± 0.141", "0.900 (1 of 2)"],
        ["fedex", "0.650 ± 0.071", "-"],
    ]
    assert test.rows[0][1] == "0.150 ± 0.071"
    write_comparison(found, "tiny-r=1", tmp_path)
    kept = json.loads((tmp_path / "tiny-r=1" / "comparison.json").read_text())
    assert [r["best"]["scores"]["validation"]["accuracy"] for r in kept["fedex"]] == [0.6, 0.7]


def test_later_seeds_run_what_was_best_on_validation_at_the_first(folder, tmp_path):
    more = "vary: {lora.r: [1, 2], training.max_steps: [3, 4]}\nchoose: [lora.r]\n"
    found = small(folder, "fedit, fedex", more)
    first = [run for run in found.runs if run.seed == 0]
    assert due(found, tmp_path) == first
    scores = {"fedit": (0.2, 0.6, 0.3, 0.5), "fedex": (0.7, 0.1, 0.7, None)}  # r, then max_steps
    for run in first:
        which = [run.choice[axis] for axis in ("lora.r", "training.max_steps")]
        make_run(run, tmp_path, scores[run.label][2 * (which[0] == "r=2") + (which[1][-1] == "4")])
    later = [run.name for run in due(found, tmp_path) if run.seed == 1]
    assert sorted(later) == [  # of equal ones the first; none while a rival is not finished
        "tiny-r=1-max_steps=3/fedex-seed1",
        "tiny-r=1-max_steps=4/fedit-seed1",
        "tiny-r=2-max_steps=3/fedit-seed1",
    ]


def test_what_was_best_in_one_place_is_run_in_the_others(folder, tmp_path):
    more = "vary: {training.max_steps: [5, 4], lora.r: [1, 2]}\nchoose: [lora.r]\n"
    found = small(folder, "fedit, fedex", more + "choose_at: {training.max_steps: 4}\n")
    judges = due(found, tmp_path)
    assert [run.name for run in judges] == [
        "tiny-max_steps=4-r=1/fedit-seed0",
        "tiny-max_steps=4-r=1/fedex-seed0",
        "tiny-max_steps=4-r=2/fedit-seed0",
        "tiny-max_steps=4-r=2/fedex-seed0",
    ]
    for run, score in zip(judges, (0.2, 0.9, 0.3, 0.4)):
        make_run(run, tmp_path, score)
    others = [run.name for run in due(found, tmp_path) if run not in judges]
    assert others == [
        "tiny-max_steps=5-r=1/fedex-seed0",
        "tiny-max_steps=5-r=1/fedex-seed1",
        "tiny-max_steps=5-r=2/fedit-seed0",
        "tiny-max_steps=5-r=2/fedit-seed1",
        "tiny-max_steps=4-r=1/fedex-seed1",
        "tiny-max_steps=4-r=2/fedit-seed1",
    ]


def test_named_choices_have_a_mean_and_metrics_go_across_without_columns(folder, tmp_path):
    vary = "vary: {e: {a: {}, b: {federation.rounds: 3}}}\n"
    found = small(folder, "fedit", vary + "columns: e\n")
    for run, score in zip(found.runs, (0.2, 0.4, 0.6, 0.8)):
        make_run(run, tmp_path, score)
    table = tables(found, tmp_path)[0]
    assert (table.header, table.rows[0][-1]) == (["method", "a", "b", "mean"], "0.500")
    table = tables(small(folder, "fedit", vary), tmp_path)[0]
    assert table.header == ["e", "method", "validation accuracy", "test accuracy"]
    assert [row[:3] for row in table.rows] == [
        ["a", "fedit", "0.300 ± 0.141"],
        ["b", "fedit", "0.700 ± 0.141"],
    ]


def test_scores_of_the_clients_own_rows_are_shown_where_there_are_no_others(folder, tmp_path):
    found = small(folder, "fedit, fedex")
    for run, score in zip(found.runs, (0.2, 0.4, 0.6, 0.8)):
        make_run(run, tmp_path, score, splits=False)
    table = tables(found, tmp_path)[0]
    assert table.header == ["method", "clients’ own rows accuracy"]
    assert [row[1] for row in table.rows] == ["0.300 ± 0.141", "0.700 ± 0.141"]
    write_comparison(found, "tiny", tmp_path)
    text = (tmp_path / "tiny" / "comparison.md").read_text()
    assert "| method | clients’ own rows accuracy |" in text and "| 0.700 ± 0.141 |" in text


def test_runs_of_a_grid_share_first_rounds_in_its_directory(folder, tmp_path):
    run = small(folder).runs[0]
    alone, sharing = (working.command(run, tmp_path, once) for once in (False, True))
    assert [w for w in sharing if w not in alone] == [
        "--first-rounds",
        str(tmp_path / "first-rounds"),
    ]


@pytest.fixture
def scripted(monkeypatch):
    """Runs are a few lines of Python instead, which are told the run's label."""

    def use(script):
        words = [sys.executable, "-c", script]
        monkeypatch.setattr(working, "command", lambda run, *_: [*words, run.label])

    return use


def test_one_failure_does_not_stop_the_others(folder, tmp_path, scripted):
    script = "import sys; print('error: no ' + sys.argv[1]); sys.exit(sys.argv[1] == 'ffa')"
    scripted(script)
    finished, said = [], []
    failed = work(small(folder).runs, tmp_path, 3, said.append, finished.append)
    assert sorted(failed) == ["tiny/ffa-seed0", "tiny/ffa-seed1"]
    assert "error: no ffa" in failed["tiny/ffa-seed0"] and ".log" in failed["tiny/ffa-seed0"]
    assert [r.label for r in finished].count("fedex") == 2 and len(said) == 12


def test_interruption_stops_the_runs_and_frees_the_directory(folder, tmp_path, scripted):
    script = (
        "import os, pathlib, time; pathlib.Path({!r}, str(os.getpid())).touch(); time.sleep(99)"
    )
    scripted(script.format(str(tmp_path)))
    runs = small(folder).runs

    def started():
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]

    def interrupt():
        while len(started()) < 2:
            time.sleep(0.05)
        with pytest.raises(UserError, match="at work here"):
            work(runs, tmp_path, 1, print, print)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        work(runs, tmp_path, 2, print, print)
    thread.join()
    assert len(started()) == 2
    for process in started():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    scripted("pass")
    assert work(runs[:1], tmp_path, 1, print, print) == {}  # the lock is free


def test_a_run_that_a_killed_grid_left_behind_keeps_others_out(folder, tmp_path, scripted):
    scripted("raise SystemExit('started')")
    run = small(folder).runs[0]
    make_run(run, tmp_path, rounds=1)
    script = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(99)"
    )
    words = [sys.executable, "-c", script, tmp_path / run.name / ".lock"]
    orphan = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert orphan.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another process"):
            work([run], tmp_path, 1, print, print)
    finally:
        orphan.kill()
        orphan.wait()
    assert "started" in work([run], tmp_path, 1, print, print)[run.name]


def test_a_killed_run_is_told_as_such(folder, tmp_path, scripted):
    scripted("import os; os.kill(os.getpid(), 9)")
    failed = work(small(folder).runs[:1], tmp_path, 1, print, print)
    assert "killed by SIGKILL" in failed["tiny/fedit-seed0"]


def test_the_command_runs_what_is_left_and_shows_the_table(command, folder, tmp_path):
    text = "recipes: [tiny.yaml]\nmethods: [fedit, full]\nseeds: [0]\nset: {federation.rounds: 1}\n"
    full = "--set", "model.quantisation=null", "--out", tmp_path / "g"
    file = written(folder, text)
    make_run(plan(file, ["model.quantisation=null"]).runs[1], tmp_path / "g", score=0.25)
    code, out, _ = command("grid", file, *full, "--list")
    assert code == 0 and "2 runs" in out and "1 of them done" in out
    code, out, err = command("grid", file, *full)
    assert code == 0, err
    assert "finished  tiny/fedit-seed0" in out and "full-seed0" not in out
    assert "validation accuracy" in out and "0.250" in out
    assert (tmp_path / "g" / "tiny" / "fedit-seed0" / "results.json").is_file()
    assert "| full |" in (tmp_path / "g" / "other.md").read_text()
    assert "| fedit |" in (tmp_path / "g" / "tiny" / "comparison.md").read_text()


def test_failures_make_exit_code_2(command, folder, tmp_path, scripted):
    scripted("raise SystemExit('error: no luck')")
    text = "recipes: [tiny.yaml]\nmethods: [fedit]\nseeds: [0]\n"
    code, out, err = command("grid", written(folder, text), "--out", tmp_path)
    assert code == 2 and "no luck" in err and "1 of 1 runs failed" in err and "±" not in out


def test_recipes_lists_grids_by_themselves(command, folder):
    (folder / "other.yaml").unlink(missing_ok=True)
    code, out, _ = command("recipes", "--directory", folder)
    assert code == 0 and out.index("tiny.yaml") < out.index("grid.yaml")
    assert "24" in out and "lora.r (2), epochs (2)" in out
