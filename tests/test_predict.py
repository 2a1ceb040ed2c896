"""`predict` of every kind of task, against transformers alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import Command
from PIL import Image
from tiny import TEXT, tiny, tokenizer_of

from fedex_lora.recipe.task import built_in_kinds, spec_of
from fedex_lora.tasks import build_task, task_spec


def told(
    command: Command, folder: Path, rows: list[dict[str, Any]], *sets: str, out: str = "out.jsonl"
) -> list[dict[str, Any]]:
    """What the command writes; `sets[0]` is the task."""
    data = folder / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [argument for pair in sets[1:] for argument in ("--set", pair)]
    where = ["--data", data, "--out", folder / out]
    code, _, errors = command("predict", folder / "model", "--task", sets[0], *where, *given)
    assert code == 0, errors
    if out.endswith("csv"):
        return list(csv.DictReader((folder / out).open()))
    return [json.loads(line) for line in (folder / out).read_text().splitlines()]


def made(folder: Path, kind: str, auto: str, **config: Any) -> tuple[Any, Any]:
    """A model as an export is, and its tokenizer."""
    path = tiny(kind, folder / "model", auto=auto, **config)
    return getattr(transformers, auto).from_pretrained(path).eval(), tokenizer_of(path)


def p_of(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.double()


def test_every_kind_of_task_has_predictions():
    templates = {"prompt": "{a}", "response": "{b}"}
    needs = {"name": "mrpc"}, templates, templates
    asked: dict[str, dict[str, Any]] = dict(zip(("glue", "instruction", "seq2seq"), needs))
    for kind in built_in_kinds():
        labels = {"labels": ["a", "b"]} if "labels" in spec_of(kind).model_fields else {}
        task = build_task(task_spec(kind=kind, **labels, **asked.get(kind, {})))
        assert task.prediction is not None, kind


def test_pairs_and_numbers(command, tmp_path):
    model, tokenizer = made(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=1)
    rows = [{"a": TEXT[i], "b": TEXT[3 - i], "label": "none"} for i in range(3)]
    columns = ("task.text_column=a", "task.text_pair_column=b", "task.minimum=2")
    for row in told(command, tmp_path, rows, "text-regression", *columns):
        value = p_of(model, tokenizer(row["a"], row["b"], return_tensors="pt")).item()
        assert row["prediction"] == pytest.approx(value, abs=1e-5) and row["label"] == "none"


def test_several_classes(command, tmp_path):
    names = {0: "x", 1: "y", 2: "z"}
    auto = "AutoModelForSequenceClassification"
    model, tokenizer = made(tmp_path, "roberta", auto, id2label=names)
    rows = [{"text": text, "labels": 7} for text in TEXT]
    task = ("multi-label-classification", "task.labels=[x, y, z]")
    for row in told(command, tmp_path, rows, *task, out="out.csv"):  # lists in CSV are JSON
        p = p_of(model, tokenizer(row["text"], return_tensors="pt"))[0].sigmoid().tolist()
        assert json.loads(row["prediction"]) == [n for n, v in zip("xyz", p) if v > 0.5]
        assert json.loads(row["probability"]) == pytest.approx(p, abs=1e-5)


def test_entities_of_texts_and_of_words(command, tmp_path):
    tags = ["O", "B-LOC", "I-LOC"]
    model, tokenizer = made(
        tmp_path, "roberta", "AutoModelForTokenClassification", id2label=dict(enumerate(tags))
    )
    task = ("token-classification", "task.labels=[LOC]", "task.max_length=16")
    text = " Sockets send bytes. "
    (row,) = told(command, tmp_path, [{"text": text}], *task)
    inputs = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0, 1:-1].tolist()
    p = p_of(model, inputs)[0, 1:-1].softmax(-1).max(-1)
    expected, last = [], 0
    for (start, end), tag, value in zip(offsets, p.indices.tolist(), p.values.tolist()):
        if not text[start:end].strip():
            continue
        if tag == 2 and last:
            expected[-1][1] = end
            expected[-1][2].append(value)
        elif tag:
            expected.append([start + (text[start] == " "), end, [value]])
        last = tag
    assert expected  # else there is nothing to compare
    for found, (start, end, values) in zip(row["prediction"], expected, strict=True):
        assert (found["start"], found["end"], found["label"]) == (start, end, "LOC")
        assert found["text"] == text[start:end]
        assert found["probability"] == pytest.approx(np.mean(values), abs=1e-5)
    words = TEXT[0].split() * 2  # some beyond max_length
    (row,) = told(command, tmp_path, [{"tokens": words}], *task, out="words.jsonl")
    inputs = tokenizer(" ".join(words), return_tensors="pt", truncation=True, max_length=16)
    best = p_of(model, inputs)[0].argmax(-1).tolist()
    at = [sum(len(w) + 1 for w in words[:i]) for i in range(len(words))]
    first = [inputs.char_to_token(start) for start in at]  # None beyond max_length
    assert None in first
    assert row["prediction"] == [None if i is None else tags[best[i]] for i in first]


def test_texts_of_an_encoder_with_a_decoder(command, tmp_path):
    model, tokenizer = made(tmp_path, "t5", "AutoModelForSeq2SeqLM")
    sets = ("task.prompt='say: {a}'", "task.response='{b}'", "task.max_new_tokens=5")
    for row in told(command, tmp_path, [{"a": t} for t in TEXT[:2]], "seq2seq", *sets):
        ids = tokenizer(f"say: {row['a']}", return_tensors="pt")
        target = torch.tensor([[1]])
        for _ in range(5):  # greedily, by hand
            new = p_of(model, {**ids, "decoder_input_ids": target})[:, -1:].argmax(-1)
            target = torch.cat([target, new], dim=1)
        new = target[0, 1:].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert row["prediction"] == tokenizer.decode(new, skip_special_tokens=True)


def test_hidden_tokens(command, tmp_path):
    model, tokenizer = made(tmp_path, "bert", "AutoModelForMaskedLM")
    texts = ["The <mask> brown <mask>.", "Nothing is hidden here."]
    first, second = told(command, tmp_path, [{"text": t} for t in texts], "masked-lm")
    inputs = tokenizer(texts[0], return_tensors="pt")
    p = p_of(model, inputs)[0][inputs["input_ids"][0] == tokenizer.mask_token_id].softmax(-1)
    best = [tokenizer.decode([i]).strip() for i in p.argmax(-1).tolist()]
    assert first["prediction"] == best and len(best) == 2 and second["prediction"] is None
    five = [t["probability"] for t in first["likeliest"][1]]
    assert five == pytest.approx(p[1].sort(descending=True).values[:5].tolist(), abs=1e-6)


def test_choices(command, tmp_path):
    model, tokenizer = made(tmp_path, "bert", "AutoModelForMultipleChoice")
    rows = [
        {"question": TEXT[0], "choices": ["fox", "dog", "a file"]},
        {"question": "Numbers", "choices": ["are added", "send bytes", "jumps"]},
    ]
    for row in told(command, tmp_path, rows, "multiple-choice"):
        inputs = tokenizer([row["question"]] * 3, row["choices"], padding=True, return_tensors="pt")
        p = p_of(model, {k: v[None] for k, v in inputs.items()})[0].softmax(-1)
        assert row["prediction"] == row["choices"][int(p.argmax())]
        assert row["probability"] == pytest.approx(p.max().item(), abs=1e-5)


def test_images(command, tmp_path):
    auto = "AutoModelForImageClassification"
    path = tiny("vit", tmp_path / "model", auto=auto, id2label={0: "x", 1: "y", 2: "z"})
    model = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    draw = np.random.default_rng(0)
    for name in "ab":
        pixels = draw.integers(0, 255, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    task = ("image-classification", "task.labels=[x, y, z]")
    rows = told(command, tmp_path, [{"image": "a.png"}, {"image": "b.png"}], *task)
    for row in rows:
        pixels = processor([Image.open(tmp_path / row["image"])], return_tensors="pt")
        p = p_of(model, pixels)[0].softmax(-1)
        assert row["prediction"] == "xyz"[int(p.argmax())]
        assert row["probability"] == pytest.approx(p.max().item(), abs=1e-5)


CHATS = [
    {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "No."}]},
    {"messages": [{"role": "user", "content": "Hi?"}]},
]


@pytest.mark.parametrize("rows", [CHATS, [{"instruction": "Hi?"}, {"instruction": "Hi?"}]])
def test_answers_of_an_assistant(command, tmp_path, rows):
    """What the assistant has said last is not looked at: both rows ask the same."""
    model, tokenizer = made(tmp_path, "llama", "AutoModelForCausalLM")
    task = ("chat", "task.template=chatml", "task.max_length=100")
    found = [row["prediction"] for row in told(command, tmp_path, rows, *task)]
    text = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        new = model.generate(**ids, do_sample=False, max_new_tokens=64, eos_token_id=2)[0]
    new = new[ids["input_ids"].shape[1] :].tolist()
    new = new[: new.index(2)] if 2 in new else new
    assert found == [tokenizer.decode(new, skip_special_tokens=True)] * 2


@pytest.mark.parametrize(
    "task, row, said",
    [
        ("text-classification", {"words": "x"}, "no column 'text'; there are: words."),
        ("token-classification", {"x": 1}, "no column 'tokens'; there are: x."),
        ("multi-label-classification", {"x": 1}, "no column 'text'; there are: x."),
        ("multiple-choice", {"question": "x"}, "no column 'choices'; there are: question."),
        ("multiple-choice", {"question": "x", "choices": ["y"]}, "in.jsonl, line 3: the choices"),
        ("chat", {"text": "x"}, "there are: text"),
        ("chat", {"messages": [{"role": "x"}]}, "in.jsonl, line 3: message 1 has the role 'x'"),
        ("chat", {"messages": []}, "in.jsonl, line 3: messages"),
        ("token-classification", {"text": " "}, "in.jsonl, line 3: the text"),
        ("math", {"x": "x"}, "there are the columns x"),
        ("commonsense", {"instruction": "x"}, "in.jsonl, line 3: answer"),
        ("image-classification", {"image": "no.png"}, "line 3: image"),
        ("masked-lm", {"text": None}, "in.jsonl, line 3: text is missing"),
    ],
)
def test_rows_that_nothing_can_be_told_of(task, row, said, command, tmp_path):
    """Columns that the program fills in itself are none of the file's."""
    tiny("bert", tmp_path / "model")
    good = {"multiple-choice": {"question": "x", "choices": ["y", "z"]}, "chat": CHATS[0]}
    good |= {"token-classification": {"text": "x"}, "masked-lm": {"text": "x"}}
    lines = [good.get(task, row)] * 2 if "line 3" in said else []
    if task == "commonsense":
        lines = [{"instruction": "answer1 or answer2?"}] * 2
    if task == "image-classification":
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        lines = [{"image": "a.png"}] * 2
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in [*lines, row]))
    sets = ["--set", "task.labels=[x, y]"] if "classification" in task else []
    where = ["--data", data, "--out", tmp_path / "out.jsonl"]
    code, _, told = command("predict", tmp_path / "model", "--task", task, *where, *sets)
    assert code == 2 and said in told and "label" not in told.partition("there are")[2]
    assert not (tmp_path / "out.jsonl").exists()
