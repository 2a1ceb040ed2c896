"""Choosing among options: parsed, generated and by likelihood."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import transformers
from datasets import Dataset
from pydantic import ValidationError
from tiny import tiny, tokenizer_of
from torch.nn import functional

from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe, task_spec
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import build_task, prompted
from fedex_lora.tasks.kinds.commonsense import (
    COMMONSENSE,
    OPTIONS,
    PROMPT,
    choice,
    option_scores,
    options,
    prompt,
)


def row(question: str, kind: str, count: int, answer: str) -> dict[str, str]:
    names = [f"{kind}{i}" for i in range(1, count + 1)] if count else ["true", "false"]
    listed = " ".join(f"{name.capitalize()}: {i}" for i, name in enumerate(names)) if count else ""
    text = f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(names)}"
    correct = {"output": f"the correct answer is {answer}", "answer": answer}
    return {"instruction": text, "input": "", **correct}


BOOLQ = row("is it a file?", "", 0, "true")
ARC = row("Which one?", "answer", 4, "answer4")
SIQA = row("What next?", "answer", 3, "answer1")
ROWS = Dataset.from_list([BOOLQ, ARC, SIQA])


def task(**more):
    return build_task(task_spec(kind="commonsense", **more))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    limit = "n_positions" if request.param == "gpt2" else "max_position_embeddings"
    return tiny(request.param, path, **{limit: 400})


@pytest.fixture
def tokenizer(folder):
    return tokenizer_of(folder)


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


LLAMA = pytest.mark.parametrize("folder", ["llama"], indirect=True)
GPT2 = pytest.mark.parametrize("folder", ["gpt2"], indirect=True)


def test_options_are_those_that_the_instruction_names():
    assert options(BOOLQ["instruction"], "true") == ("true", "false")
    assert options(ARC["instruction"], "answer4") == ("answer1", "answer2", "answer3", "answer4")
    assert options(SIQA["instruction"], "answer4") == ("answer1", "answer2", "answer3")
    assert options(SIQA["instruction"], "option1") == options("", "true") == ()


@pytest.mark.parametrize(
    "answer, output, chosen",
    [
        ("answer1", "the correct answer is answer3", "answer3"),
        ("answer1", "Answer5 or answer1", "answer5"),
        ("true", "the correct answer is False, not true", "false"),
        ("ending2", "ending 2", None),
        ("solution2", "the correct answer is answer2 solution2", "solution2"),
        ("option1", "", None),
    ],
)
def test_the_first_option_in_an_output_is_the_choice(answer, output, chosen):
    assert choice(answer, output) == chosen


def test_prompts():
    assert prompt({"instruction": "Do {it}."}) == PROMPT.format("Do {it}.")
    assert PROMPT.endswith("### Instruction:\n{}\n\n### Response:\n")
    assert "### Input:\nthis\n\n### Response" in prompt({"instruction": "Do.", "input": "this"})


def log_p(model, before: list[int], after: list[int]) -> float:
    """log p(after | before) in float64, token by token, without padding."""
    with torch.no_grad():
        logits = model.double().eval()(torch.tensor([before + after])).logits[0]
    log_probs = functional.log_softmax(logits, dim=-1)
    return sum(log_probs[len(before) + i - 1, t].item() for i, t in enumerate(after))


def test_likelihoods_are_those_of_the_whole_response(folder, model, tokenizer):
    likely = task(score="likelihood")
    encoded = likely.encode_evaluation(ROWS, tokenizer, 390)
    slow = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = [["true", "false"], list(OPTIONS["openbookqa"][:4]), list(OPTIONS["openbookqa"][:3])]
    expected = [
        [
            log_p(
                slow,
                tokenizer(prompt(r))["input_ids"],
                tokenizer(f"the correct answer is {o}", add_special_tokens=False)["input_ids"],
            )
            for o in listed
        ]
        for r, listed in zip(ROWS, names)
    ]
    for batch_size in (1, 4):
        scores = option_scores(model, encoded, tokenizer, batch_size)
        assert [pytest.approx(e, rel=1e-5) for e in expected] == scores
    right = [
        listed[e.index(max(e))] == a for listed, e, a in zip(names, expected, ROWS["answer"][:])
    ]
    found = likely.evaluate(model, encoded, tokenizer, 3)
    assert found["accuracy"] == sum(right) / 3
    assert likely.primary == "accuracy" and found["loss"] > 0


@LLAMA
def test_a_prompt_without_room_counts_as_wrong(monkeypatch, model, tokenizer, caplog):
    long = {**BOOLQ, "instruction": "so " * 400 + BOOLQ["instruction"]}
    rows = Dataset.from_list([long, BOOLQ])
    encoded = task().encode_evaluation(rows, tokenizer, 390)
    assert "1 of 2 rows count as wrong" in caplog.text
    monkeypatch.setattr(prompted, "generate", lambda *a: ["true"] * len(a[2]))
    assert task(generate=True).evaluate(model, encoded, tokenizer, 2)["accuracy"] == 0.5
    assert option_scores(model, encoded, tokenizer, 2)[0] == []
    assert task(score="likelihood").evaluate(model, encoded, tokenizer, 2)["accuracy"] <= 0.5


@GPT2
def test_options_beyond_learned_positions_are_told(model, tokenizer):
    whole = len(tokenizer(prompt(BOOLQ))["input_ids"])
    long = {**BOOLQ, "instruction": "q" * (399 - whole) + BOOLQ["instruction"]}
    encode = partial(task().encode_evaluation, Dataset.from_list([long]), tokenizer)
    with pytest.raises(UserError, match=r"takes at most 400; lower task\.max_length by \d+"):
        option_scores(model, encode(400), tokenizer, 2)


@LLAMA
def test_a_model_that_learned_an_answer_generates_it(model, tokenizer):
    asked = Dataset.from_list([BOOLQ, {**BOOLQ, "instruction": "no? true/false"}])
    learn = task(generate=True, max_new_tokens=40)
    batch = learn.collator(tokenizer)(list(map(dict, learn.encode(asked, tokenizer, 390))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    encoded = learn.encode_evaluation(asked, tokenizer, 390)
    scores = learn.evaluate(model, encoded, tokenizer, 2)
    assert scores["accuracy"] == 1.0 and scores["loss"] < 0.5


@pytest.mark.parametrize(
    "more, table, message",
    [
        ({}, [{"instruction": "a", "output": "b"}], "x: no column 'answer'"),
        ({}, [BOOLQ, {**BOOLQ, "output": None}], "x, line 2: output is None; expected a text"),
        ({}, [{**BOOLQ, "answer": "yes"}], "x, line 1: answer is 'yes'; expected one of true, f"),
        ({"name": "boolq"}, [ARC], "answer is 'answer4'; expected one of true, false"),
        ({}, [{**SIQA, "answer": "answer4"}], "names only the options answer1, answer2, answer3"),
        ({}, [{**BOOLQ, "instruction": "why?"}], r"names only the options \(none\)"),
    ],
)
def test_bad_rows_are_named(more, table, message):
    with pytest.raises(UserError, match=message):
        task(**more).check(Dataset.from_list(table), "x")


def test_likelihood_and_generation_exclude_each_other():
    with pytest.raises(ValidationError, match="nothing is generated; leave it out"):
        task_spec(kind="commonsense", score="likelihood", generate=True)


def test_splits_are_the_data_sets():
    assert task().evaluation_splits == ("validation", "test", *COMMONSENSE)
    assert task(name="piqa").evaluation_splits == ("validation", "test", "piqa")
    assert set(OPTIONS) == set(COMMONSENSE) and task(name="piqa").name == "commonsense/piqa"
    scores = {"test": {"accuracy": 0.9}, "boolq": {"accuracy": 0.5}, "piqa": {"accuracy": 0.25}}
    assert task(generate=True).average(scores) == {"average": {"accuracy": 0.375}}
    assert task(generate=True).average({"boolq": {"accuracy": 0.5}}) == {}


@LLAMA
def test_a_run_tells_each_data_set_and_their_mean(folder, tmp_path):
    files = {"train": [BOOLQ, ARC] * 3, "boolq": [BOOLQ], "social_i_qa": [SIQA, SIQA]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = {
        "name": "c",
        "model": {"name": str(folder)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "federation": {"clients": 2, "rounds": 1},
        "task": {"kind": "commonsense", "max_length": 390, "score": "likelihood"},
        "data": {"path": tmp_path},
        "training": {"per_device_train_batch_size": 3, "num_train_epochs": 1},
    }
    scores = start_run(Recipe.model_validate(raw), tmp_path / "run")["last"]["scores"]
    assert list(scores) == ["boolq", "social_i_qa", "average"]
    mean = (scores["boolq"]["accuracy"] + scores["social_i_qa"]["accuracy"]) / 2
    assert scores["average"] == {"accuracy": mean}


@pytest.mark.parametrize("name", COMMONSENSE)
def test_published_rows_have_their_answer_among_their_options(shared, name):
    files = sorted((shared / "data" / name).glob("*.jsonl"))
    if not files:
        pytest.skip(f"no {name}")
    for file in files:
        rows = [json.loads(line) for line in file.read_text().split("\n") if line]
        task(name=name).check(Dataset.from_list(rows), str(file))
        for one in rows:
            found = options(one["instruction"], one["answer"])
            written = one["instruction"].rsplit("Answer format: ", 1)[1].strip().split("/")
            assert list(found) == written and one["answer"] in found
            assert choice(one["answer"], one["output"]) == one["answer"]
