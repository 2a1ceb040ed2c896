"""The command line: what a user sees, above all when something is wrong."""

import io
import json
import sys

import pytest
import yaml
from small_runs import recipe

from fedex_lora import __version__, cli
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import QuorumLost
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs import checkpoint
from fedex_lora.runs.rundir import RunDir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe(folder)))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The recipe on rows to be dealt out, not a file a client."""
    rows = folder / "data"
    text = "".join((rows / f"{n}.jsonl").read_text() for n in ("ann", "bob", "cleo"))
    (rows / "train.jsonl").write_text(text)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["data"] = {"path": str(rows)}
    (folder / "whole.yaml").write_text(yaml.safe_dump(raw))
    return folder / "whole.yaml"


def test_run_evaluate_export_and_resume_of_a_finished_run(command, folder, tmp_path):
    code, out, _ = command("run", folder / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 0 and "round 2; validation: accuracy" in out and "final/adapter" in out
    code, out, _ = command("evaluate", tmp_path / "run", "--round", "last")
    assert code == 0 and "macro_f1" in out and "round 2" in out
    code, out, _ = command("export", tmp_path / "run", "--as", "model")
    assert code == 0 and (tmp_path / "run" / "final" / "model" / "config.json").exists()
    code, out, _ = command("export", tmp_path / "run", "--rank", 1, "--out", tmp_path / "one")
    assert code == 0 and "Relative error of the change" in out
    code, out, _ = command("resume", tmp_path / "run")
    assert code == 0 and "finished; nothing to do" in out


def test_compare_prints_and_writes_mean_and_deviation(command, folder, tmp_path):
    arguments = ("compare", folder / "recipe.yaml", "--methods", "local,fedit,fedex,fedex-svd:1")
    sets = ("--set", "federation.rounds=1", "--set", "evaluation.where=both")
    code, out, _ = command(*arguments, "--seeds", "0,1", *sets, "--out", tmp_path / "c")
    assert code == 0 and "±" in out and "accuracy on the rows of" in out
    results = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [len(results[m]) for m in ("local", "fedit", "fedex", "fedex-svd:1")] == [2] * 4
    assert "| fedit |" in (tmp_path / "c" / "comparison.md").read_text()
    code, out, _ = command(*arguments, "--seeds", "0,1", *sets, "--out", tmp_path / "c")
    assert code == 0 and out.count("nothing to do") == 8


def test_methods_recipes_and_version(command, folder):
    assert all(name in command("methods")[1] for name in METHODS)
    assert command("version")[1].strip() == __version__
    assert command("--version")[:2] == (0, f"{__version__}\n")
    code, out, _ = command("recipes", "--directory", "recipes")
    assert code == 0 and "sst2" in out


BAD = {
    "misspelt key": (["lora.lora_alfa=3"], "did you mean 'lora_alpha'"),
    "unknown method": (["method.name=fedx"], "did you mean 'fedex'"),
    "unknown training key": (["training.lerning_rate=1"], "did you mean 'learning_rate'"),
    "bad training value": (["training.optim=nonsense"], "training: "),
    "no such modules": (["lora.target_modules=[querry]"], "query"),
    "ranks not allowed": (["lora.ranks=[1,2,3]"], "fedex needs equal ranks"),
    "no model": (["model.name=./nowhere"], "nowhere"),
    "a training value of another type": (["training.weight_decay=x"], "expected a number"),
    "a learning rate below zero": (["training.learning_rate=-1"], "expected a number above 0"),
    "batches of nothing": (["training.per_device_train_batch_size=0"], "of at least 1"),
    "a schedule without its arguments": (
        ["training.lr_scheduler_type=cosine_with_min_lr"],
        "training: ",
    ),
    "an absent optimizer": (["training.optim=galore_adamw"], "training: "),
    "an absent logger": (["training.report_to=wandb"], "training: "),
    "dropping the only batch": (
        ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=64"],
        "dataloader_drop_last",
    ),
    "longer than the model": (["task.max_length=4096"], "at most 158 tokens"),
    "longer questions than the model takes": (
        ["task.evaluation_max_length=4096"],
        "task.evaluation_max_length: 4096, but",
    ),
    "modules as a bad pattern": (["lora.target_modules='*('"], "lora"),
    "threads": (["engine.threads=100000"], "engine.threads"),
    "missing data": (["data={path: nowhere}"], "nowhere"),
    "a path that is too long": ([f"data={{path: {'x' * 300}}}"], "File name too long"),
    "a compiler's mode": (["training.torch_compile_mode=fast"], "Unrecognized mode"),
    "a type of the Trainer's": (["training.bf16=maybe"], "expected true or false, got 'maybe'"),
    "a key without a value": (["training.use_cache=null"], "training.use_cache: expected true"),
    "missing column": (["task.text_column=sentence"], "no column 'sentence'"),
    "too many clients": (["federation.clients=100"], "100"),
    "a client without rows": (
        ["federation.clients=12", "federation.partition={kind: dirichlet, alpha: 0.001}"],
        "larger alpha",
    ),
    "labels out of range": (["task.labels=[x, y]"], ".jsonl, line 3: label is 2"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_is_one_short_text_and_exit_code_2(command, whole, tmp_path, what):
    sets, expected = BAD[what]
    arguments = [x for s in sets for x in ("--set", s)]
    code, _, err = command("run", whole, *arguments, "--out", tmp_path / "run")
    assert code == 2 and expected in err.replace("\n", " ")
    assert "Traceback" not in err and len(err.splitlines()) <= 4
    assert not (tmp_path / "run").exists()


def test_a_server_without_rows_cannot_evaluate(command, folder, tmp_path):
    files = ", ".join(str(folder / "data" / f"{n}.jsonl") for n in ("ann", "bob", "cleo"))
    sets = ("--set", f"data={{clients: [{files}]}}", "--set", "evaluation.where=both")
    code, _, err = command("run", folder / "recipe.yaml", *sets, "--out", tmp_path / "run")
    assert code == 2 and "no labelled rows" in err


def test_a_split_of_another_name_is_shown(command, whole, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, to in (("train", "train"), ("validation", "dev")):
        text = (whole.parent / "data" / f"{name}.jsonl").read_text()
        (rows / f"{to}.jsonl").write_text(text)
    sets = ("--set", f"data={{path: {rows}}}")
    code, _, err = command("run", whole, *sets, "--out", tmp_path / "run")
    assert code == 2 and "there is: dev.jsonl, train.jsonl; its file is called validation" in err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--methods", "", "expected one or more"),
        ("--methods", "fedit:4", "only a truncated residual has a rank"),
        ("--methods", "fedex-svd", "needs the rank"),
        ("--methods", "fedx", "did you mean 'fedex'"),
        ("--seeds", "²", "is no whole number"),
    ],
)
def test_bad_comparisons(command, folder, tmp_path, option, value, expected):
    out = ("--out", tmp_path / "c")
    code, _, err = command("compare", folder / "recipe.yaml", option, value, *out)
    assert code == 2 and expected in err and not (tmp_path / "c").exists()


def test_a_comparison_grows(command, folder, tmp_path):
    arguments = ("compare", folder / "recipe.yaml", "--set", "federation.rounds=1")
    out = ("--out", tmp_path / "c")
    command(*arguments, "--methods", "fedit", "--seeds", "0,1", *out)
    code, printed, _ = command(*arguments, "--methods", "fedit,ffa", "--seeds", "1", *out)
    results = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert code == 0 and [r["seed"] for r in results["fedit"]] == [0, 1]
    assert [r["seed"] for r in results["ffa"]] == [1] and "fedit" in printed


def test_brackets_in_names_are_no_markup(command, folder, tmp_path):
    out = tmp_path / "odd [/red] ü [bold]x"
    sets = ("--set", "name=demo [/x]", "--set", "federation.rounds=1")
    code, printed, _ = command("run", folder / "recipe.yaml", *sets, "--out", out)
    assert code == 0 and "demo [/x]" in printed and "odd [/red] ü [bold]x" in printed


def test_ctrl_c_says_how_to_go_on(command, folder, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedex_lora.runs.run.start_run", stop)
    code, _, err = command("run", folder / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 130 and f"run {folder / 'recipe.yaml'} --out {tmp_path / 'run'}" in err

    def stop_later(recipe, out, *_):
        RunDir(out).create(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedex_lora.runs.run.start_run", stop_later)
    run = tmp_path / "a run"
    code, _, err = command("run", folder / "recipe.yaml", "--out", run)
    assert code == 130 and f"fedex-lora resume '{run}'" in err

    def too_few(*_):
        raise QuorumLost("1 client")

    monkeypatch.setattr("fedex_lora.runs.run.resume_run", too_few)
    code, _, err = command("resume", run)
    assert code == 2 and "1 client" in err and f"fedex-lora resume '{run}'" in err
    monkeypatch.setattr("fedex_lora.flower.deploy.launch.launch", stop)
    text = (run / "recipe.yaml").read_text().replace("kind: local", "kind: flower")
    (run / "recipe.yaml").write_text(text)
    code, _, err = command("resume", run, "--deployment", tmp_path / "d")
    assert code == 130 and f"fedex-lora resume '{run}' --deployment {tmp_path / 'd'}" in err


def test_files_of_a_run_that_a_hand_got_at(command, folder, tmp_path):
    command("run", folder / "recipe.yaml", "--out", tmp_path / "run")
    for name in ("results.json", "environment.json"):
        (tmp_path / "run" / name).write_text("{nonsense")
    code, _, _ = command("resume", tmp_path / "run")
    assert code == 0
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("{nonsense\n")
    code, _, err = command("resume", tmp_path / "run")
    assert code == 2 and "metrics.jsonl: damaged" in err


def test_an_unwritable_directory_and_a_file_in_the_way(command, folder, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, err = command("run", folder / "recipe.yaml", "--out", out)
        assert code == 2 and "file" in err and "--out" in err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_is_said_and_loses_nothing(command, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = command("run", folder / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 2 and "No space left on device" in err and "resume" in err
    monkeypatch.undo()
    code, _, _ = command("resume", tmp_path / "run")
    assert code == 0


def test_a_name_that_is_too_long_is_said(command, folder, tmp_path):
    out = tmp_path / ("x" * 300)
    for arguments in (("run", folder / "recipe.yaml"), ("export", out), ("merge", out)):
        code, _, err = command(*arguments, "--out", out)
        assert code == 2 and "File name too long" in err, err


def test_what_a_terminal_cannot_write_is_escaped(folder, monkeypatch):
    """As where output goes to a file on Windows, which is then cp1252."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr("sys.argv", ["fedex-lora", "data", str(folder / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    sys.stdout.flush()
    assert not stop.value.code
    assert b"A file is opened" in written.getvalue() and b"\\u27e6" in written.getvalue()


@pytest.mark.parametrize("name", ["resume", "evaluate", "export"])
def test_a_directory_without_a_run(command, tmp_path, name):
    code, _, err = command(name, tmp_path)
    assert code == 2 and "no run there" in err


def test_nan_below_the_quorum_stops_with_the_checkpoint_intact(command, folder, tmp_path):
    sets = ["--set", "training.learning_rate=6e11", "--set", "training.max_grad_norm=0"]
    code, _, err = command("run", folder / "recipe.yaml", *sets, "--out", tmp_path / "run")
    assert (
        code == 2 and "ann: head of" in err and "at most 1e+12 are taken" in err and "resume" in err
    )
    assert (tmp_path / "run" / "checkpoints" / "round-0001.safetensors").exists()
