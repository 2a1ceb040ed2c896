"""Scoring any model on any task: the same numbers as the run's, refusals, and interruptions."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_runs import recipe
from tiny import TEXT, tiny

from fedex_lora.cli.asked import asked
from fedex_lora.errors import UserError
from fedex_lora.runs import evaluation
from fedex_lora.runs.evaluation import evaluate, load_subject
from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run

XYZ = ["task.labels=[x, y, z]"]
SHORT = ["task.max_new_tokens=8", "task.max_length=150", "evaluation.batch_size=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, its exports, and rows for it; a tiny language model and problems for that."""
    folder = tmp_path_factory.mktemp("evaluate")
    start_run(recipe(folder), folder / "run")
    trained = open_run(folder / "run")
    export_model(trained, folder / "model")
    export_adapter(trained, folder / "adapter")
    rows = [{"text": f"{TEXT[i % 4]} {i}", "label": "xyz"[i % 3]} for i in range(7)]
    write(folder / "other.jsonl", rows)
    problems = [{"question": f"{i} and {i}?", "answer": f"So #### {2 * i}"} for i in range(5)]
    write(folder / "problems.jsonl", problems)
    tiny("llama", folder / "llama")
    tiny("roberta", folder / "deep", num_hidden_layers=3)
    tiny("roberta", folder / "wide", hidden_size=32)
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scored(what, out, task=None, data=None, sets=(), **options):
    """The results of one evaluation."""
    spec = asked(str(what), task, None if data is None else str(data), list(sets))
    return evaluate(load_subject(str(what), spec), spec, out, **options)[1]


def texts(folder, out, **options):
    """Answers to the problems, with the results."""
    options = {"task": "math/gsm8k", "data": folder / "problems.jsonl", "sets": SHORT, **options}
    results = scored(folder / "llama", out, **options)
    return results, (out / "outputs-problems.jsonl").read_text().splitlines()


@pytest.mark.parametrize("what", ["run", "model", "adapter"])
def test_a_run_and_its_exports_have_the_run_s_own_scores(folder, what, tmp_path):
    own = json.loads((folder / "run" / "results.json").read_text())["best"]["scores"]
    task = {} if what == "run" else {"task": "text-classification", "data": folder / "data"}
    sets = [] if what == "run" else [*XYZ, "task.max_length=32"]
    sets += [f"model.name={folder / 'roberta'}"] if what == "adapter" else []
    found = scored(folder / what, tmp_path / "out", **task, sets=sets)["scores"]
    assert found.keys() == own.keys() == {"validation", "test"}
    tolerance = 0 if what == "run" else 1e-6
    for split, metrics in own.items():
        assert found[split] == pytest.approx(metrics, abs=tolerance, rel=tolerance)


def test_an_adapter_in_its_run_s_directory_finds_its_base(folder, tmp_path):
    sets, task = [*XYZ, "task.max_length=32"], ("text-classification", folder / "data")
    inside = folder / "run" / "final" / "adapter"
    here, there = (
        scored(what, tmp_path / str(i), *task, sets=[*sets, *more])["scores"]
        for i, (what, more) in enumerate(
            [(inside, []), (folder / "adapter", [f"model.name={folder / 'roberta'}"])]
        )
    )
    assert here == there


def test_adapters_as_others_save_them(folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "outer" / "hospital")
    task = ("text-classification", folder / "data", [*XYZ, f"model.name={folder / 'roberta'}"])
    expected = scored(folder / "adapter", tmp_path / "a", *task)["scores"]
    assert scored(tmp_path / "outer", tmp_path / "b", *task)["scores"] == expected
    file = tmp_path / "outer" / "hospital" / "adapter_model.safetensors"
    tensors = load_file(file)
    named = {
        k.replace(".weight", ".default.weight") if ".lora_" in k else k: t
        for k, t in tensors.items()
    }
    save_file(named, file)
    with pytest.raises(UserError, match=r"named as in a model's state.*fedex-lora merge"):
        scored(tmp_path / "outer", tmp_path / "c", *task)
    key = next(iter(tensors))
    save_file(tensors | {key: torch.empty(0)}, file)
    with pytest.raises(UserError, match=r"is empty, of size \(0,\).*ZeRO-3"):
        scored(tmp_path / "outer", tmp_path / "c", *task)


def test_other_rows_are_scored_as_plain_transformers_does(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "other.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = torch.tensor(["xyz".index(row["label"]) for row in rows])
    with torch.no_grad():
        logits = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
    right = (logits.argmax(dim=1) == labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    for what in ("run", "model"):
        task = None if what == "run" else "text-classification"
        out = tmp_path / what
        results = scored(folder / what, out, task, folder / "other.jsonl", XYZ)
        assert results["rows"] == {"other": 7}
        assert results["scores"]["other"]["accuracy"] == right
        assert results["scores"]["other"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert json.loads((out / "scores.json").read_text()) == results


def test_an_interrupted_evaluation_goes_on_where_it_was(folder, tmp_path):
    def stop(split, done, total):
        if done:
            raise KeyboardInterrupt

    whole, lines = texts(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        texts(folder, tmp_path / "torn", on_progress=stop)
    file = tmp_path / "torn" / "outputs-problems.jsonl"
    begun = file.read_text()
    told = []
    again, after = texts(folder, tmp_path / "torn", on_progress=lambda *t: told.append(t))
    assert begun.count("\n") == 1 + 2 and "\n".join(after).startswith(begun.strip())
    assert told[0] == ("problems", 2, 5) and told[-1] == ("problems", 5, 5)
    assert again["scores"] == whole["scores"] and sorted(after) == sorted(lines)
    assert len((tmp_path / "torn" / "outputs-problems.verdicts.jsonl").read_text().split("\n")) == 6


def test_a_finished_evaluation_is_not_made_again_and_not_overwritten(folder, tmp_path, monkeypatch):
    first, _ = texts(folder, tmp_path)
    monkeypatch.setattr(evaluation, "OutputFile", None)
    assert texts(folder, tmp_path)[0] == first
    with pytest.raises(UserError, match=r"holds another evaluation \(of another task\)"):
        texts(folder, tmp_path, sets=[*SHORT, "task.max_new_tokens=9"])
    with pytest.raises(UserError, match=r"another evaluation \(of another data and rows\)"):
        texts(folder, tmp_path, sets=[*SHORT, "data.evaluation_examples=2"])
    assert json.loads((tmp_path / "scores.json").read_text()) == first


def test_weights_that_changed_are_another_evaluation(folder, tmp_path):
    shutil.copytree(folder / "llama", tmp_path / "llama")
    texts(tmp_path, tmp_path / "out", data=folder / "problems.jsonl")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="another state of the model or the rows"):
        texts(tmp_path, tmp_path / "out", data=folder / "problems.jsonl")


def test_classes_without_names_are_taken_in_the_task_s_order_and_that_is_said(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {i: f"LABEL_{i}" for i in range(3)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for i, what in enumerate((tmp_path / "model", folder / "adapter", folder / "model")):
        base = [f"model.name={folder / 'roberta'}"] if what == folder / "adapter" else []
        task = ("text-classification", folder / "other.jsonl", [*XYZ, *base])
        (*notes,) = scored(what, tmp_path / str(i), *task)["notes"]
        said = [f"{what} has no names for its classes; taken as x, y, z, in this order"]
        assert notes == (said if i < 2 else [])


def test_the_command_shows_and_writes_scores(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = ("--task", "text-classification", "--set", XYZ[0], "--data", folder / "data")
    code, out, _ = command("evaluate", folder / "model", *task, "--split", "ann")
    assert code == 0 and "ann (9)" in out and "macro_f1" in out
    (made,) = (tmp_path / "runs").iterdir()
    assert f"{made.relative_to(tmp_path)}/scores.json" in out
    code, out, _ = command("evaluate", folder / "run", "--split", "test", "--round", "last")
    assert code == 0 and "run, round 2" in out and "test (4)" in out
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_generates_keeps_its_texts_and_finds_its_own_scores(
    command, tmp_path, monkeypatch
):
    asks = {"kind": "instruction", "prompt": "{text}", "response": "{label}", "generate": True}
    spec = recipe(
        tmp_path,
        "llama",
        task={**asks, "max_new_tokens": 3, "max_length": 150},
        federation={"rounds": 1},
    )
    start_run(spec, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, _, errors = command("evaluate", "run")
    assert code == 0, errors
    (made,) = (tmp_path / "runs").iterdir()
    found = [json.loads(line) for line in (made / "outputs-test.verdicts.jsonl").open()]
    assert [row["row"] for row in found] == [0, 1, 2, 3] and "correct" in found[0]
    own = json.loads((tmp_path / "run" / "results.json").read_text())["best"]["scores"]
    assert json.loads((made / "scores.json").read_text())["scores"] == own


TEXTS = ("--task", "text-classification", "--set", XYZ[0], "--data", "{}/data")
ADAPTER = ("{}/adapter", *TEXTS, "--set")
MODEL = ("{}/model", "--task", "text-classification", "--data", "{}/data")
REFUSED = {
    "nothing there": (("{}/gone", *TEXTS), "no such directory; expected one of a run, a model or"),
    "no such name": (("nobody/nothing", *TEXTS), "'nobody/nothing' cannot be loaded"),
    "a directory of something else": (("{}/data", *TEXTS), r"no run there, .*\(no recipe.yaml"),
    "a model without its head": (("{}/roberta", *TEXTS), "classifier.* would be random"),
    "other classes": ((*MODEL, "--set", "task.labels=[x, y]"), "its classes are x, y, z; those of"),
    "another order": ((*MODEL, "--set", "task.labels=[z, y, x]"), "same in the same order"),
    "a number for classes": (("{}/model", "--task", "glue/stsb", "--data", "{}/data"), "classes"),
    "a run of other classes": (("{}/run", "--task", "glue/sst2"), "the run's classes: x, y, z"),
    "a run of another kind": (("{}/run", "--task", "causal-lm"), "the run's kind of model"),
    "another kind of base": ((*ADAPTER, "model.name={}/llama"), "score.* nor .* would be random"),
    "a wider base": ((*ADAPTER, "model.name={}/wide"), "does not go with .*wide.*size mismatch"),
    "a deeper base": ((*ADAPTER, "model.name={}/deep"), "does not go with .*missing adapter keys"),
    "a run's other model": (("{}/run", "--set", "model.dtype=bfloat16"), "as it was trained"),
    "a base for a model": ((*MODEL, *TEXTS[2:4], "--set", "model.name=gpt2"), "has no other base"),
    "no task": (("{}/model", "--data", "{}/data"), "--task: missing"),
    "no data": (("{}/model", "--task", "glue/sst2"), "--data: missing"),
    "a task misspelt": (("{}/model", "--task", "glue/sst", "--data", "x/y"), "did you mean 'sst2'"),
    "no such kind": (("{}/model", "--task", "gleu", "--data", "x/y"), "did you mean 'glue'"),
    "no such file": (("{}/run", "--data", "{}/gone.jsonl"), "--data: there is no"),
    "no such split": (("{}/run", "--split", "dev"), "has no split 'dev'"),
    "no such column": (("{}/run", "--data", "{}/problems.jsonl"), "no column 'text'"),
    "a training key": (("{}/run", "--set", "training.seed=1"), "--set training.seed=1: not used"),
    "a client": (("{}/run", "--client", "ann"), "no client has its own"),
    "an occupied directory": (("{}/run", "--split", "test", "--out", "{}/data"), "is in use"),
    "too long": (("{}/run", "--set", "task.max_length=4096"), "takes at most 158 tokens"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_scored_is_one_text_and_exit_code_2(what, command, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(folder.rglob("*"))
    arguments, message = REFUSED[what]
    code, _, err = command("evaluate", *(a.replace("{}", str(folder)) for a in arguments))
    assert code == 2, err
    assert re.search(message, err.replace("\n", " ")), err
    assert sorted(folder.rglob("*")) == before
