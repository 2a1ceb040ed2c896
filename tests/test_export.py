"""Exports: where they go, what they say, what they leave behind when something fails."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from commands import Command
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_runs import StopAfter, recipe
from tiny import tiny

from fedex_lora.aggregation.adapter import Factors
from fedex_lora.errors import UserError
from fedex_lora.model import files
from fedex_lora.runs.card import loading_lines
from fedex_lora.runs.export import default_name, export_adapter, export_model
from fedex_lora.runs.records import best_record, comparable
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two rounds."""
    folder = tmp_path_factory.mktemp("export")
    start_run(recipe(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run):
    return open_run(run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """An unfinished run: three of nine rounds, the best of which is the second."""
    folder = tmp_path_factory.mktemp("stopped")
    spec = recipe(folder, federation={"rounds": 9})
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, folder / "run", StopAfter(3))
    directory = RunDir(folder / "run")
    records = directory.records()
    for record, score in zip(records, (0.1, 0.9, 0.5), strict=True):
        record["score"] = score
    directory.write_records(records)
    return folder / "run"


@pytest.fixture
def command(command: Command) -> Command:
    """Runs `fedex-lora export`; returns (exit code, output, errors)."""
    return partial(command, "export")


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


@pytest.mark.parametrize("write", [export_model, export_adapter])
def test_a_full_disk_leaves_nothing_and_a_retry_succeeds(trained, tmp_path, monkeypatch, write):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match=r"out: the export cannot be written: .*No space.*`out`"):
        write(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("of an export that was killed")
    write(trained, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize("write", [export_model, export_adapter])
def test_places_that_cannot_be_written_or_are_in_use(trained, tmp_path, write):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        with pytest.raises(UserError, match="cannot be written"):
            write(trained, out)
    for out in (tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="exists and is not empty"):
            write(trained, out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_while_updates_are_saved_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    spec = recipe(tmp_path, records={"save_updates": True})
    with pytest.raises(UserError, match=r"rounds.*No space left.*Free some.*fedex-lora resume"):
        start_run(spec, tmp_path / "run")


def test_everything_exported_is_readable_as_the_umask_asks(trained, tmp_path):
    before = os.umask(0o027)
    try:
        export_model(trained, tmp_path / "model")
        export_adapter(trained, tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.glob("*/*")}
    assert {"model.safetensors", "adapter_model.safetensors"} < set(modes)
    assert set(modes.values()) == {0o640}


def test_default_places_tell_exports_apart(command, run, tmp_path):
    run = copied(run, tmp_path)
    best = RunDir(run).read_json("results.json")["best_round"]
    for options, name in (
        ([], "adapter"),
        (["--as", "model"], "model"),
        (["--as", "model", "--dtype", "float32"], "model-float32"),
        (["--rank", 1], "adapter-rank1"),
        (["--round", "last"], "adapter-round2"),
        (["--round", best, "--as", "model"], f"model-round{best}"),
    ):
        code, out, _ = command(run, *options)
        written = "Already there" if name == "adapter" else "Written"
        assert code == 0 and f"{written}: {run}/final/{name}\n" in out
        code, out, _ = command(run, *options)
        assert code == 0 and f"Already there: {run}/final/{name}\n" in out
    code, _, err = command(run, "--out", run / "final" / "adapter")
    assert code == 2 and "exists and is not empty" in err


def test_options_that_do_not_fit_are_refused(command, run, tmp_path):
    code, _, err = command(run, "--as", "model", "--rank", 2, "--out", tmp_path / "out")
    assert code == 2 and "--rank" in err
    code, _, err = command(run, "--client", "ann", "--out", tmp_path / "out")
    assert code == 2 and "one global model" in err
    assert not list(tmp_path.iterdir())


def test_a_client_s_own_model_has_its_own_place(command, tmp_path):
    start_run(recipe(tmp_path, method={"name": "local"}), tmp_path / "run")
    code, out, _ = command(tmp_path / "run", "--client", "bob")
    assert code == 0 and "final/adapter-bob" in out
    assert default_name("model", client="bob", round=3) == "model-bob-round3"


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_printed_lines_load_the_export(command, run, tmp_path, monkeypatch, kind):
    run = copied(run, tmp_path)
    code, out, _ = command(run, "--as", kind)
    lines = out[out.index("import ") :]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    model = names["model"]
    assert code == 0 and model.config.num_labels == 3
    stored = load_file(next((run / "final" / kind).glob("*.safetensors")))
    name = next(k for k in stored if k.endswith("out_proj.weight"))
    loaded = {k.replace(".modules_to_save.default.", "."): v for k, v in model.state_dict().items()}
    assert torch.equal(loaded[name], stored[name])


def test_regression_loads_with_one_label_and_a_language_model_with_none(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    stsb = {"kind": "glue", "name": "stsb", "labels": None}
    *_, line, _ = loading_lines(recipe(tmp_path / "one", "roberta", task=stsb), tmp_path)
    assert "AutoModelForSequenceClassification" in line and "num_labels=1," in line
    *_, line, _ = loading_lines(recipe(tmp_path / "two", "gpt2"), tmp_path)
    assert "AutoModelForCausalLM" in line and "num_labels" not in line


def test_class_names_are_written_as_python_reads_them(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    labels = ["it's", 'a "quote"', "naïve 🙂"]
    spec = recipe(tmp_path, task={"labels": labels})
    line = loading_lines(spec, tmp_path)[2]
    named = eval(line[line.index("{") : line.index("}") + 1])
    assert named == dict(enumerate(labels))


def test_the_lines_of_a_quantised_base_quantise_it(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    spec = recipe(tmp_path, model={"quantisation": "nf4", "placement": "side"})
    line = loading_lines(spec, tmp_path)[2]
    config = eval(line[line.index("transformers.Bits") : -1], {"transformers": transformers})
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert {"lm_head", "classifier"} <= set(config.llm_int8_skip_modules)


def test_an_adapter_names_its_base_and_no_place_on_this_machine(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "models_of_mine").mkdir()
    (tmp_path / "models_of_mine" / "__init__.py").touch()
    base = tiny("roberta", tmp_path / "models_of_mine" / "small")
    name = "package:models_of_mine/small"
    spec = recipe(tmp_path, model={"name": name})
    start_run(spec, tmp_path / "run")
    adapter = tmp_path / "run" / "final" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    texts = [f.read_text() for f in adapter.iterdir() if f.suffix in (".json", ".md")]
    assert len(texts) >= 4 and not any(str(tmp_path) in text for text in texts)
    # the lines that are printed are for this machine
    assert f'"{base.resolve()}", num_labels=3' in loading_lines(spec, adapter)[2]
    code, _, err = command(tmp_path / "run", "--base-name", "org/small", "--out", tmp_path / "x")
    assert code == 0, err
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/small"
    assert 'base_model: "org/small"' in (tmp_path / "x" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_an_export_has_all_that_goes_with_it(run, tmp_path, kind):
    write = export_adapter if kind == "adapter" else export_model
    out = write(open_run(run), tmp_path / kind).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token == "<pad>" and tokenizer("The fox")["input_ids"]
    # the run cut texts to 32 tokens
    assert json.loads((out / "tokenizer.json").read_text())["truncation"] is None
    names = {"0": "x", "1": "y", "2": "z"}
    stored = json.loads((out / ("base.json" if kind == "adapter" else "config.json")).read_text())
    assert stored["id2label"] == names and stored["pad_token_id"] == tokenizer.pad_token_id
    card = (out / "README.md").read_text()
    assert "Classes: 0: x, 1: y, 2: z." in card and "from_pretrained" in card


def test_the_card_has_scores_where_clients_evaluate(tmp_path):
    results = start_run(recipe(tmp_path, evaluation={"where": "clients"}), tmp_path / "run")
    card = (tmp_path / "run" / "final" / "adapter" / "README.md").read_text()
    best = results["best"]
    assert f"| clients' own, mean | accuracy | {best['score']:.4f} |" in card
    for name, scores in best["client_scores"].items():
        assert f"| {name}'s own | accuracy | {scores['accuracy']:.4f} |" in card
    # those that came after the checkpoint are in the run's records alone
    directory = RunDir(tmp_path / "run")
    records = directory.records()
    for record in records:
        record["client_scores"]["ann"]["accuracy"] = 0.123
    directory.write_records(records)
    out = export_adapter(open_run(tmp_path / "run"), tmp_path / "again").path
    assert "| ann's own | accuracy | 0.1230 |" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_printed_lines_work_for_a_batch_of_two(kind, capsys, tmp_path):
    """GPT-2's and Llama's tokenizers have no padding token."""
    task = {"kind": "text-classification", "labels": ["x", "y", "z"]}
    spec = recipe(tmp_path, kind, task=task, federation={"rounds": 1})
    start_run(spec, tmp_path / "run")
    adapter = tmp_path / "run" / "final" / "adapter"
    names: dict = {}
    exec("\n".join(loading_lines(spec, adapter)), names)
    tokenizer, model = names["tokenizer"], names["model"].eval()
    texts = ["The quick brown fox jumps over", "A file"]
    with torch.no_grad():
        both = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
        alone = [model(**tokenizer(t, return_tensors="pt")).logits[0] for t in texts]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_a_state_that_is_not_finite_is_not_exported(trained, tmp_path):
    site = next(iter(trained.model.layers))
    factors = dict(trained.state.factors)
    for bad in (float("nan"), float("inf")):
        b = factors[site].B.clone()
        b[0, 0] = bad
        state = replace(trained.state, factors=factors | {site: Factors(factors[site].A, b, 1.0)})
        for write in (export_adapter, export_model):
            with pytest.raises(UserError, match="is not finite"):
                write(replace(trained, state=state), tmp_path / "out")
            assert not list(tmp_path.iterdir())


def test_the_best_record():
    def records(*scores):
        return [{"round": i + 1, "score": s} for i, s in enumerate(scores)]

    scores = records(None, 0.5, 0.7, 0.7, float("nan"))
    assert best_record(scores, True) == {"round": 4, "score": 0.7}  # of equals the later
    assert best_record(scores, False) == {"round": 2, "score": 0.5}
    assert best_record([*records(None), {"round": 2}], True) is None


def test_of_equal_scores_the_lower_loss_is_better():
    def record(round, loss, **more):
        return {"round": round, "score": 0.0, **more, "loss": loss}

    server = [record(i, 0, scores={"v": {"loss": loss}}) for i, loss in enumerate((3.0, 2.0, 4.0))]
    assert best_record(server, True) == server[1]
    clients = [
        record(i, 0, scored_by=["a", "b"], client_scores={"a": {"loss": x}, "b": {"loss": 1.0}})
        for i, x in enumerate((3.0, 2.0, 4.0))
    ]
    assert best_record(clients, True) == clients[1]
    trained = [
        record(i, 0, weights={"a": 0.25, "b": 0.75}, clients={"a": {"loss": x}, "b": {"loss": 1.0}})
        for i, x in enumerate((3.0, 2.0, 4.0))
    ]
    assert best_record(trained, True) == trained[1]


def test_rounds_that_different_clients_scored_are_not_compared():
    told = {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.9}}
    one = {"round": 1, "score": 0.9, "scored_by": ["a", "b"], "client_scores": told}
    two = {"round": 2, "score": 0.5, "scored_by": ["a"]}
    three = {"round": 3, "score": None, "scored_by": []}
    assert best_record([one, two, three], True) == two
    assert not comparable([one, two, three])
    assert comparable([one, three]) and best_record([one, three], True) == one


def test_the_best_round_of_an_unfinished_run_is_the_best_so_far(command, stopped, tmp_path):
    assert open_run(stopped).state.version == 2
    assert open_run(stopped, "last").state.version == 3
    run = copied(stopped, tmp_path)
    code, out, _ = command(run)
    assert code == 0 and "final/adapter-round2" in out


def damage(run: Path, round: int) -> None:
    file = run / "checkpoints" / f"round-{round:04d}.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def test_without_its_checkpoint_a_round_is_refused_and_the_others_are_listed(stopped, tmp_path):
    run = copied(stopped, tmp_path)
    with pytest.raises(UserError, match=r"round-0007.*of rounds (1, )?2, 3;"):
        open_run(run, 7)
    damage(run, 2)
    with pytest.raises(UserError, match=r"round-0002.*corrupted.*of rounds (1, )?3;"):
        open_run(run)


def test_a_damaged_newest_checkpoint_is_told(command, stopped, tmp_path):
    run = copied(stopped, tmp_path)
    damage(run, 3)
    code, out, _ = command(run, "--out", tmp_path / "out")
    assert code == 0 and "round-0003.safetensors: checkpoint is corrupted" in out


def test_what_truncation_holds_back_is_told_by_both_and_in_the_card(tmp_path):
    method = {"name": "fedex-svd", "rank": 1, "flush": False}
    start_run(recipe(tmp_path, method=method), tmp_path / "run")
    trained = open_run(tmp_path / "run")
    assert trained.state.carry
    for name, write in (("model", export_model), ("adapter", export_adapter)):
        notes = " ".join(write(trained, tmp_path / name).notes)
        assert "waits in the carry" in notes
        assert "waits in the carry" in (tmp_path / name / "README.md").read_text()


def test_rounding_to_the_base_s_dtype_is_told(run, trained, tmp_path):
    assert export_model(trained, tmp_path / "exact").rounding == 0
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    bf16 = export_model(trained, tmp_path / "bf16", torch.bfloat16)
    got = load_file(tmp_path / "bf16" / "model.safetensors")
    names = [f"{site}.weight" for site in trained.model.layers]
    missed = torch.cat([(got[n].float() - exact[n]).flatten() for n in names]).norm()
    size = torch.cat([exact[n].flatten() for n in names]).norm()
    assert abs(bf16.rounding - missed / size) < 1e-6 and 1e-4 < bf16.rounding < 4e-3
    assert "rounding the weights to torch.bfloat16" in bf16.notes[-1]


def test_an_adapter_of_a_bf16_base_tells_how_the_run_rounded_it(tmp_path):
    for placement in ("fold", "side"):
        model = {"dtype": "bfloat16", "placement": placement}
        start_run(recipe(tmp_path, model=model), tmp_path / placement)
        done = export_adapter(open_run(tmp_path / placement), tmp_path / f"out-{placement}")
        assert (done.rounding > 1e-4) == (placement == "fold")
        assert ("rounded its base to bfloat16" in " ".join(done.notes)) == (placement == "fold")
        lines = loading_lines(open_run(tmp_path / placement).recipe, done.path)
        assert 'dtype="bfloat16"' in lines[2]
