"""Word problems of three data sets: recognised, encoded, answered and scored."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import tiny, tokenizer_of

from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe, task_spec
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import build_task, latex, prompted
from fedex_lora.tasks.arithmetic import answer_of, same
from fedex_lora.tasks.kinds.math import PROMPT, problem

METAMATH = {"type": "GSM_AnsAug", "query": "1+1?", "response": "It is 2.\nThe answer is: 2"}
GSM8K = {"question": "Ann has 2, Bob 3. All?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac12}$.", "level": "Level 1"}
ROWS = {"metamath": METAMATH, "gsm8k": GSM8K, "math": MATH}


def task(**more):
    return build_task(task_spec(kind="math", **{"generate": True, "compare": "string"} | more))


def mixed():
    names = dict.fromkeys(name for row in (GSM8K, MATH) for name in row)
    return Dataset.from_list([{n: row.get(n) for n in names} for row in (GSM8K, MATH, GSM8K)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizer_of(folder)


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, reference", [("metamath", "2"), ("gsm8k", "5"), ("math", r"\frac12")]
)
def test_rows_are_recognised_by_their_columns(name, reference):
    found = problem(ROWS[name])
    assert found is not None and (found.form, found.reference) == (name, reference)


def test_the_answer_that_math_names_itself_goes_before_the_box():
    found = problem({**MATH, "answer": "0.5"})
    assert found is not None and found.reference == "0.5"


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_on_the_solution_after_the_prompt(name, tokenizer):
    rows = Dataset.from_list([ROWS[name]])
    (row,) = task(name=name).encode(rows, tokenizer, 400)
    answered = [label for label in row["labels"] if label != -100]
    asked = row["input_ids"][: -len(answered)]
    found = problem(ROWS[name])
    assert found is not None
    assert tokenizer.decode(answered) == found.solution + tokenizer.eos_token
    assert tokenizer.decode(asked) == PROMPT.format(found.question)
    assert PROMPT.endswith("### Response: Let's think step by step.")


def test_solutions_are_never_cut_in_training(tokenizer, caplog):
    long = {**GSM8K, "answer": "so " * 50 + "\n#### 5"}
    rows = Dataset.from_list([GSM8K, long, long])
    lengths = [len(row["input_ids"]) for row in task().encode(rows, tokenizer, 2000)]
    encoded = task().encode(rows, tokenizer, lengths[0])
    assert [len(row["input_ids"]) for row in encoded] == lengths[:1]
    assert "2 of 3 rows left out: their prompt and response together are longer" in caplog.text
    with pytest.raises(UserError, match="none of the 3 rows can be used"):
        task().encode(rows, tokenizer, lengths[0] - 1)


def test_no_row_is_left_out_of_an_evaluation_but_those_without_an_answer(tokenizer, caplog):
    encode = task().encode_evaluation
    assert encode is not None
    wordy = {**GSM8K, "question": "so " * 300}
    open_ended = {**GSM8K, "answer": "Who knows?"}
    rows = Dataset.from_list([GSM8K, wordy, open_ended])
    encoded = encode(rows, tokenizer, 400)
    assert [len(row["input_ids"]) <= 400 for row in encoded] == [True, True]
    assert set(encoded[1]["labels"]) == {-100}
    assert "1 of 3 rows left out: no final answer" in caplog.text
    assert "1 of 2 rows count as wrong: their prompt alone fills max_length" in caplog.text
    with pytest.raises(UserError, match="none of the 1 rows can be evaluated"):
        encode(Dataset.from_list([wordy]), tokenizer, 400)
    with pytest.raises(UserError, match="none of the 1 solutions names its final answer"):
        encode(Dataset.from_list([open_ended]), tokenizer, 400)


class Kept:
    """Outputs that are remembered."""

    def __init__(self):
        self.rows = []

    def begin(self, decoding, prompts):
        return {}

    def add(self, texts): ...

    def verdicts(self, rows):
        self.rows = list(rows)


def test_accuracy_in_all_and_of_each_data_set(monkeypatch, model, tokenizer):
    said = ["The answer is: 5 apples", r"\boxed{0.5}", "#### 6\nQuestion: 2+3?\n#### 5"]
    monkeypatch.setattr(prompted, "generate", lambda *_: said)
    encoded = task().encode_evaluation(mixed(), tokenizer, 400)
    kept = Kept()
    scores = task().evaluate(model, encoded, tokenizer, 2, kept)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert (scores["accuracy_gsm8k"], scores["accuracy_math"]) == (0.5, 1.0)
    assert scores["loss"] > 0
    keys = ("row", "output", "reference", "extracted", "correct")
    assert [tuple(row[key] for key in keys) for row in kept.rows] == [
        (0, said[0], "5", "5", True),
        (1, said[1], r"\frac12", "0.5", True),
        (2, said[2], "5", "6", False),
    ]
    assert kept.rows[1]["prompt"] == PROMPT.format(MATH["problem"])


def test_rows_of_one_data_set_have_one_accuracy(monkeypatch, model, tokenizer):
    monkeypatch.setattr(prompted, "generate", lambda *_: ["5"])
    encoded = task().encode_evaluation(Dataset.from_list([GSM8K]), tokenizer, 400)
    assert set(task().evaluate(model, encoded, tokenizer, 2)) == {"accuracy", "loss", "perplexity"}


@pytest.mark.parametrize(
    "form, output, answer",
    [
        ("gsm8k", "The answer is: $1,234.", "1,234"),
        ("gsm8k", "Then 5 + 7 = 12 of them.", "12"),
        ("gsm8k", "The answer is: unknown. 7", "7"),
        ("math", "The answer is: $x = 5$.\n\n### Instruction:\nNext. The answer is: 6", "x = 5"),
        ("metamath", "nothing", None),
    ],
)
def test_answers_of_outputs(form, output, answer):
    assert answer_of(form, output) == answer


def test_math_verify_is_asked_only_where_spelling_differs(monkeypatch):
    asked = []
    monkeypatch.setattr(latex, "equal_latex", lambda pairs: asked.extend(pairs) or [True])
    pairs = [("2", "2.0"), ("x^2", "$x x$"), ("2", None)]
    assert same(pairs, "latex") == [True, True, False] and asked == [("x^2", "x x")]
    assert same(pairs, "string") == [True, False, False]


def test_what_a_task_is_called_and_evaluated_on():
    assert (task(name="gsm8k").name, task().name) == ("math/gsm8k", "math")
    assert task().evaluation_splits == ("validation", "test", "test_gsm8k", "test_math")
    assert (task().primary, task(generate=False).primary) == ("accuracy", "perplexity")


@pytest.mark.parametrize(
    "table, message",
    [
        ([{"text": "a"}], "x: there are the columns text; expected query and response"),
        ([GSM8K, {**GSM8K, "answer": " "}], "x, line 2: no problem with a solution"),
        ([MATH, {**MATH, "problem": None}], "x, line 2: no problem with a solution"),
    ],
)
def test_bad_rows_are_named(table, message):
    with pytest.raises(UserError, match=message):
        task().check(Dataset.from_list(table), "x")


def test_training_rows_are_of_the_data_set_that_is_named(tokenizer):
    with pytest.raises(
        UserError, match=r"task\.name: metamath, but there are training rows of gsm8k"
    ):
        task(name="metamath").encode(Dataset.from_list([GSM8K]), tokenizer, 400)
    encoded = task(name="metamath").encode_evaluation(mixed(), tokenizer, 400)
    assert encoded["form"][:] == ["gsm8k", "math", "gsm8k"]


def test_a_missing_library_is_told_when_rows_are_checked(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rows = Dataset.from_list([GSM8K])
    with pytest.raises(UserError, match=r"or set task\.compare: string"):
        task(compare="latex").check(rows, "x")
    task(compare="latex", generate=False).check(rows, "x")
    task().check(rows, "x")


def test_a_run_trains_on_one_data_set_and_is_evaluated_on_others(folder, tmp_path):
    for name, rows in {"train": [METAMATH] * 6, "test_math": [MATH], "other": [GSM8K]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = {
        "name": "math",
        "model": {"name": str(folder)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "federation": {"clients": 2, "rounds": 1},
        "task": {"kind": "math", "name": "metamath", "max_length": 400, "max_new_tokens": 3}
        | {"generate": True, "compare": "string"},
        "data": {"path": tmp_path, "evaluation": {"test_gsm8k": str(tmp_path / "other.jsonl")}},
        "training": {"per_device_train_batch_size": 3, "num_train_epochs": 1},
    }
    torch.manual_seed(0)
    results = start_run(Recipe.model_validate(raw), tmp_path / "run")
    scores = results["last"]["scores"]
    assert list(scores) == ["test_gsm8k", "test_math"] and results["metric"] == "accuracy"
    assert all(0 <= s["accuracy"] <= 1 and s["perplexity"] > 1 for s in scores.values())
    assert "test_gsm8k: 1 rows of " in results["description"]


def test_a_prompt_without_positions_for_its_answer_is_told_before_training(tmp_path):
    model = tiny("gpt2", tmp_path / "gpt2", n_positions=256)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GSM8K) + "\n")
    raw = {
        "name": "math",
        "model": {"name": str(model)},
        "lora": {"r": 2, "target_modules": ["c_attn"]},
        "federation": {"clients": 1},
        "task": {"kind": "math", "max_length": 256, "max_new_tokens": 200, "generate": True}
        | {"compare": "string"},
        "data": {"path": tmp_path},
    }
    with pytest.raises(UserError, match=r"max_new_tokens: 200 after a prompt of \d+ tokens"):
        set_up(Recipe.model_validate(raw))
