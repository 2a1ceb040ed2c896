# pyright: reportAttributeAccessIssue=false
"""The E2E task: prompts, groups of references, scores of what a model says."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from test_generation import Talker
from tiny import tiny, tokenizer_of
from torch.nn import functional

from fedex_lora.errors import UserError
from fedex_lora.model.adapted import load_model
from fedex_lora.recipe import LoraSpec, ModelSpec, task_spec
from fedex_lora.tasks import build_task, nlg
from fedex_lora.tasks.outputs import OutputFile

MEANINGS = ["name[A dog], area[by the line]", "name[A fox]", "name[A dog], area[by the line]"]
ROWS = Dataset.from_dict(
    {
        "meaning_representation": MEANINGS,
        "human_reference": ["The dog is by the line.", "A quick brown fox.", "A dog, by the line."],
    }
)
ASK = {"prompt": "{meaning_representation}", "response": "{human_reference}"}


def e2e(**more):
    return build_task(task_spec(kind="e2e", **more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def tokenizer(folder):
    return tokenizer_of(folder)


def split(row):
    """The tokens of the prompt and those that are predicted."""
    start = row["labels"].count(-100)
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    return row["input_ids"][:start], row["input_ids"][start:]


def test_prompt_and_response(tokenizer):
    prompt, response = split(e2e().encode(ROWS, tokenizer, 100)[0])
    assert tokenizer.decode(prompt) == "name : A dog | area : by the line ||"
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]) == " The dog is by the line."


def test_long_rows_are_left_out_of_training_only(tokenizer, caplog):
    task = e2e()
    lengths = [len(ids) for ids in task.encode(ROWS, tokenizer, 200)["input_ids"]]
    encoded = task.encode(ROWS, tokenizer, max(lengths) - 1)
    assert [len(ids) for ids in encoded["input_ids"]] == [n for n in lengths if n < max(lengths)]
    assert "rows left out" in caplog.text
    assert task.encode_evaluation and len(task.encode_evaluation(ROWS, tokenizer, 30)) == 3


class Speaker(Talker):
    """A talker that can also be asked for its loss."""

    def forward(self, input_ids, **_):
        logits = self.weight.expand(*input_ids.shape, 320)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_each_meaning_is_put_into_words_once_and_scored_on_all_its_references(
    tokenizer, tmp_path, monkeypatch
):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(nlg, "has_java", lambda: False)  # test_nlg has the other scores
    task = e2e(generate=True, num_beams=2)
    said = " A dog is by the line."
    speaker = Speaker([*tokenizer(said)["input_ids"], tokenizer.eos_token_id])
    encoded = task.encode_evaluation(ROWS, tokenizer, 100)
    outputs = OutputFile(tmp_path / "said.jsonl", "key")
    scores = task.evaluate(speaker, encoded, tokenizer, 4, outputs)
    dog, fox, again = ROWS["human_reference"]
    wanted = ([said.strip()] * 2, [[dog, again], [fox]])
    assert scores["BLEU"] == nlg.bleu(*wanted) > 0 and scores["NIST"] == nlg.nist(*wanted)
    assert scores["perplexity"] == pytest.approx(320)
    assert task.primary == "BLEU" and task.higher_is_better
    rows = [json.loads(line) for line in outputs.verdicts_path.read_text().splitlines()]
    assert [row["references"] for row in rows] == wanted[1]
    assert rows[1]["prompt"] == "name : A fox ||" and rows[1]["output"] == said
    header = json.loads(outputs.path.read_text().splitlines()[0])
    assert header["decoding"] == {
        "max_new_tokens": 64,
        "num_beams": 2,
        "length_penalty": 0.9,
        "no_repeat_ngram": 4,
    }


def test_without_generation_there_is_the_loss_alone(folder, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # no scorers are needed then
    task = e2e()
    task.check(ROWS, "x")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    encoded = task.encode_evaluation(ROWS, tokenizer, 100)
    assert set(task.evaluate(model, encoded, tokenizer, 2)) == {"perplexity", "loss"}
    assert task.primary == "perplexity" and not task.higher_is_better
    with pytest.raises(UserError, match="needs pycocoevalcap"):
        e2e(generate=True).check(ROWS, "x")


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("meaning_representation", "a dog", "line 2: meaning_representation is 'a dog'; expected"),
        ("meaning_representation", None, "line 2: meaning_representation is None"),
        ("meaning_representation", "name[]", r"line 2: .* is 'name\[\]'"),
        ("human_reference", " ", "line 2: human_reference is ' '; expected a text"),
        ("human_reference", None, "line 2: human_reference is None"),
    ],
)
def test_bad_rows_are_named(column, value, message):
    table = {**ROWS[:], column: [ROWS[column][0], value, ROWS[column][2]]}
    with pytest.raises(UserError, match=message):
        e2e().check(Dataset.from_dict(table), "x")


def test_lines_are_looked_up_for_bad_rows_only():
    """Each takes a pass over the file, so that asking for every row takes hours."""
    for task in (e2e(), build_task(task_spec(kind="instruction", **ASK))):
        task.check(ROWS, "x", lambda row: pytest.fail("nothing is wrong with any row"))


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="x: no column 'human_reference'"):
        e2e().check(ROWS.remove_columns("human_reference"), "x")


def test_label_smoothing_passes_over_the_prompt(folder, tokenizer, tmp_path):
    """0.9 · −log p(label) − 0.1 · mean over the vocabulary of log p, over labelled tokens."""
    task = e2e()
    model = load_model(
        ModelSpec(name=str(folder)),
        LoraSpec(r=2, target_modules=["c_attn"]),
        auto_model=task.auto_model,
        peft_task_type=task.peft_task_type,
        model_kwargs={},
        seed=0,
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
    )
    trainer = transformers.Trainer(model.module, arguments)
    encoded = task.encode(ROWS, tokenizer, 100)
    batch = task.collator(tokenizer)([dict(row) for row in encoded])
    with torch.no_grad():
        found = trainer.compute_loss(model.module.eval(), dict(batch))
        log_p = functional.log_softmax(model.module(**batch).logits.double(), dim=-1)
    smoothed = [
        -0.9 * log_p[row, i - 1, label] - 0.1 * log_p[row, i - 1].mean()
        for row, labels in enumerate(batch["labels"].tolist())
        for i, label in enumerate(labels)
        if label != -100
    ]
    assert float(found) == pytest.approx(float(sum(smoothed) / len(smoothed)), rel=1e-5)
