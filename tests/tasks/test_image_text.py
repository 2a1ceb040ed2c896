"""Questions about images: a tiny LLaVA through a federation and its exports, and bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tiny import tiny
from torch.nn import functional

from fedex_lora.data.load import of_files
from fedex_lora.errors import UserError
from fedex_lora.model.load import load_processor
from fedex_lora.recipe import ModelSpec, Recipe, task_spec
from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import Task, build_task
from fedex_lora.tasks.preview import pieces

PLAIN = transformers.AutoModelForImageTextToText


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llava", tmp_path_factory.mktemp("llava") / "model")


def task(**block: Any) -> Task:
    return build_task(task_spec(kind="image-text", **block))


def processor_of(folder: Path) -> Any:
    return load_processor(ModelSpec(name=str(folder)), "AutoProcessor")


def rows(folder: Path, name: str = "rows.jsonl", count: int = 3) -> Path:
    """Images that differ and answers of unequal length."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(len(name))
    for i in range(count):
        pixels = draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}-{i}.png")
    lines = [
        {"image": f"{name}-{i}.png", "question": "what is read?", "answer": "lines " * (i + 1)}
        for i in range(count)
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def read(file: Path, made: Task) -> Dataset:
    return of_files([file], made, None, 0, "x")


def answer_loss(module: Any, processor: Any, row: dict[str, Any]) -> tuple[float, int]:
    """By transformers alone: −log p of the answer and the end-of-text token, and their number."""
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=text, images=row["image"].convert("RGB"), return_tensors="pt")
    answer = processor.tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [2]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    with torch.no_grad():
        logits = module(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    nll = functional.cross_entropy(
        logits[-len(answer) - 1 : -1].double(), torch.tensor(answer), reduction="sum"
    )
    return nll.item(), len(answer)


def test_the_loss_is_over_answers_and_padding_changes_nothing(model, tmp_path):
    made, processor = task(), processor_of(model)
    module = PLAIN.from_pretrained(model).eval()
    data = read(rows(tmp_path), made)
    encoded = made.encode(data, processor, 128)
    found = [answer_loss(module, processor, dict(row)) for row in data]
    expected = sum(loss for loss, _ in found) / sum(count for _, count in found)
    for size in (1, 3):
        scores = made.evaluate(module, encoded, processor, size)
        assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    batch = made.collator(processor)([encoded[i] for i in range(3)])
    trained = module(**batch).loss.item()  # what the Trainer makes less
    assert trained == pytest.approx(expected, rel=1e-5)
    assert (batch["labels"] != -100).sum() == sum(count for _, count in found)
    marked = pieces(made, encoded[0], processor)
    assert [p.text for p in marked if p.learned] == ["lines </s>"]
    turned = data.map(lambda row: {"image": row["image"].rotate(180)})
    other = made.evaluate(module, made.encode(turned, processor, 128), processor, 3)
    assert abs(other["loss"] - expected) > 1e-5  # images are seen


def test_a_run_learns_in_the_language_model_and_its_exports_score_the_same(model, tmp_path):
    clients = [rows(tmp_path / "data", f"{name}.jsonl") for name in ("ann", "bob")]
    rows(tmp_path / "data", "validation.jsonl")
    recipe = Recipe.model_validate(
        {
            "name": "seeing",
            "model": {"name": str(model)},
            "lora": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
            "federation": {"clients": 2, "rounds": 1},
            "task": {"kind": "image-text", "generate": True, "max_new_tokens": 3},
            "data": {"clients": clients, "path": tmp_path / "data"},
            "training": {"learning_rate": 0.05, "max_steps": 4},
        }
    )
    result = start_run(recipe, tmp_path / "run")
    scores = result["best"]["scores"]["validation"]
    trained = open_run(tmp_path / "run")
    assert {name.split(".")[1] for name in trained.model.layers} == {"language_model"}
    assert len(trained.model.layers) == 4
    made = task(generate=True, max_new_tokens=3)
    data = read(tmp_path / "data" / "validation.jsonl", made)
    whole = export_model(trained, tmp_path / "whole").path
    adapter = export_adapter(trained, tmp_path / "adapter").path
    processor = processor_of(whole)
    encoded = made.encode(data, processor, 128)
    merged = PLAIN.from_pretrained(whole)
    beside = peft.PeftModel.from_pretrained(PLAIN.from_pretrained(model), adapter)
    for one in (merged, beside):
        assert made.evaluate(one, encoded, processor, 2) == pytest.approx(scores, rel=1e-4)
    before = made.evaluate(PLAIN.from_pretrained(model), encoded, processor, 2)
    assert scores["loss"] < before["loss"]
    assert "transformers.AutoProcessor" in (adapter / "README.md").read_text()


def test_rows_with_images_are_read_where_others_are_on_disk(model, tmp_path):
    made, file = task(), rows(tmp_path)
    found = of_files([file], made, None, 0, "x", on_disk=True)
    processor = processor_of(model)
    ours, theirs = (made.encode(r, processor, 128) for r in (found, read(file, made)))
    assert ours.remove_columns("image").to_list() == theirs.remove_columns("image").to_list()


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TEXT = {"type": "text", "text": "Where?"}
SAME = {
    "columns": {"question": "Where?", "answer": "Here."},
    "parts": chat(("user", [{"type": "image"}, TEXT]), ("assistant", "Here.")),
    "texts": chat(("user", "Where?"), ("assistant", "Here."), ("user", "And now?")),
    "LLaVA's": {
        "conversations": [
            {"from": "human", "value": "<image>\nWhere?"},
            {"from": "gpt", "value": "Here."},
        ]
    },
}


def one(folder: Path, row: dict[str, Any]) -> Path:
    Image.new("RGB", (20, 20), "red").save(folder / "x.png")
    (folder / "in.jsonl").write_text(json.dumps({"image": "x.png", **row}) + "\n")
    return folder / "in.jsonl"


@pytest.mark.parametrize("form", SAME)
def test_forms_of_one_row(form, model, tmp_path):
    made = task()
    row = made.encode(read(one(tmp_path, SAME[form]), made), processor_of(model), 64)[0]
    assert row["prompt"] == "user: <image>Where?\nassistant: " and row["response"] == "Here."


def test_several_turns_and_a_template_by_name(model, tmp_path):
    """Earlier answers are part of the prompt; the image stands before the first question."""
    made = task(template="chatml")
    said = ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")
    file = one(tmp_path, chat(*said, ("assistant", "d")))
    row = made.encode(read(file, made), processor_of(model), 256)[0]
    assert row["response"] == "d" and row["prompt"].count("<image>") == 1
    assert "<|im_start|>user\n<image>\na<|im_end|>" in row["prompt"]
    assert row["prompt"].endswith("c<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question": "a"}, "no column 'answer'"),
        ({"question": " ", "answer": "b"}, "in.jsonl, line 1: question is empty"),
        ({"question": "a", "answer": None}, "in.jsonl, line 1: answer is missing"),
        (chat(("user", "a")), "line 1: a conversation without an assistant"),
        (chat(("assistant", "a")), "line 1: the assistant speaks first"),
        (chat(("user", [{"type": "image"}] * 2 + [TEXT]), ("assistant", "a")), "line 1: 2 images"),
        (chat(("user", [{"type": "audio"}]), ("assistant", "a")), "line 1: the content of message"),
        ({"image": "y.png", "question": "a", "answer": "b"}, "y.png: no such file"),
    ],
)
def test_rows_that_are_none(row, said, tmp_path):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        read(one(tmp_path, row), task())


def test_the_tokens_of_images_count(model, tmp_path):
    made, processor = task(), processor_of(model)
    data = read(rows(tmp_path), made)  # answers of one, two and three words
    whole = made.collator(processor)([made.encode(data, processor, 128)[i] for i in range(3)])
    longest = [int(length) for length in whole["attention_mask"].sum(1)]
    assert longest[0] < longest[1] < longest[2]
    assert (whole["input_ids"] == processor.image_token_id).sum() > 3  # an image is several
    for length, kept in ((longest[2], 3), (longest[2] - 1, 2), (longest[1] - 1, 1)):
        assert len(made.encode(data, processor, length)) == kept


def test_models_and_rows_that_do_not_fit(model, tmp_path):
    made, processor = task(), processor_of(model)
    data = read(one(tmp_path, SAME["columns"]), made)
    with pytest.raises(
        UserError,
        match=r"none of the 1 rows can be used: .* than max_length \(4 tokens\); an image alone",
    ):
        made.encode(data, processor, 4)
    processor.chat_template = None
    with pytest.raises(UserError, match=r"task\.template: missing; .* \(LlavaProcessor\)"):
        made.encode(data, processor, 64)


def test_answers_without_labels(command, model, tmp_path):
    file = rows(tmp_path, "asked.jsonl", 2)
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({k: r[k] for k in ("image", "question")}) + "\n" for r in asked)
    )
    where = ["--data", file, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4]
    code, _, errors = command("predict", model, "--task", "image-text", *where)
    assert code == 0, errors
    processor, module = processor_of(model), PLAIN.from_pretrained(model).eval()
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = Image.open(tmp_path / row["image"])
        text = f"user: <image>{row['question']}\nassistant: "
        inputs = processor(text=text, images=image, return_tensors="pt")
        ids = inputs["input_ids"]
        for _ in range(4):  # greedily, by hand
            with torch.no_grad():
                logits = module(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        new = ids[0, -4:].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert row["prediction"] == processor.tokenizer.decode(new, skip_special_tokens=True)
