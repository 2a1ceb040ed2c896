"""Tasks on people's own columns: through a run and an export that plain transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_runs import recipe
from tiny import TEXT, tiny, tokenizer_of

from fedex_lora.data.read import read
from fedex_lora.recipe import Recipe, task_spec
from fedex_lora.runs.export import export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import build_task
from fedex_lora.tasks.chat_templates import TEMPLATES

CASES: dict[str, tuple[str, dict[str, Any], Any]] = {  # kind of task: model, block, row by number
    "text-regression": ("bert", {}, lambda i: {"text": TEXT[i % 4], "label": i / 2}),
    "multi-label-classification": (
        "roberta",
        {"labels": ["a", "b", "c"]},
        lambda i: {"text": TEXT[i % 4], "labels": ["a", "b", "c"][: i % 4]},
    ),
    "token-classification": (
        "roberta",
        {"labels": ["ANIMAL"]},
        lambda i: {"tokens": ["The", "lazy", "dog"], "tags": ["O", "B-ANIMAL", "I-ANIMAL"]},
    ),
    "masked-lm": ("bert", {}, lambda i: {"text": TEXT[i % 4]}),
    "multiple-choice": (
        "bert",
        {},
        lambda i: {"question": TEXT[i % 4], "choices": ["fox", "dog", "file"], "label": i % 3},
    ),
    "chat": (
        "llama",
        {"template": "chatml", "max_length": 120},
        lambda i: {"instruction": "Who?", "output": TEXT[i % 4]},
    ),
    "t5": (
        "t5",
        {"kind": "seq2seq", "prompt": "say: {a}", "response": "{b}", "generate": True},
        lambda i: {"a": TEXT[i % 4], "b": "fox"},
    ),
    "bart": (
        "bart",
        {"kind": "seq2seq", "prompt": "{a}", "response": "{b}"},
        lambda i: {"a": TEXT[i % 4], "b": "fox"},
    ),
}
TARGETS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}


def spec_of(name: str, folder: Path) -> Recipe:
    """A recipe for the task on a tiny model, with its rows."""
    kind, block, row = CASES[name]
    raw = recipe(folder, "roberta").model_dump(exclude_unset=True)
    auto = "AutoModelForMaskedLM" if name == "masked-lm" else None
    raw["model"] = {"name": str(tiny(kind, folder / f"own-{kind}", auto=auto))}
    raw["lora"] = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS.get(kind, ["query", "value"])}
    raw["task"] = {"kind": name, "max_length": 40, **block}
    if block.get("generate"):
        raw["task"]["max_new_tokens"] = 3
    raw["federation"]["rounds"] = 1
    for file in (folder / "data").iterdir():
        lines = [json.dumps(row(i)) for i in range(5)]
        file.write_text("\n".join(lines) + "\n")
    return Recipe.model_validate(raw)


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_and_its_export_scores_the_same(name, tmp_path):
    spec = spec_of(name, tmp_path)
    results = start_run(spec, tmp_path / "run")
    scores = results["best"]["scores"]["validation"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert not record["refused"] and all(c["loss"] > 0 for c in record["clients"].values())
    trained = open_run(tmp_path / "run")
    if name in TARGETS:
        assert any("encoder." in layer for layer in trained.model.layers)
        assert any("decoder." in layer for layer in trained.model.layers)
    out = export_model(trained, tmp_path / "out").path
    task = build_task(spec.task)
    model = getattr(transformers, task.auto_model).from_pretrained(out)
    length = spec.task.max_length
    plain = tiny_scores(task, model, tmp_path, length)
    if name == "chat":
        assert tokenizer_of(out).chat_template == TEMPLATES["chatml"]
    assert plain == pytest.approx(scores, rel=1e-3, abs=1e-4)
    before = getattr(transformers, task.auto_model).from_pretrained(
        spec.model.name, **task.model_kwargs()
    )
    if name not in ("masked-lm", *TARGETS):  # whose head is not fresh
        return
    assert tiny_scores(task, before, tmp_path, length)["loss"] > scores["loss"]


def tiny_scores(task, model, folder: Path, length: int) -> dict[str, float]:
    rows = read(folder / "data" / "validation.jsonl")
    tokenizer = tokenizer_of(folder / "out")
    encode = task.encode_evaluation or task.encode
    return task.evaluate(model, encode(rows, tokenizer, length), tokenizer, 4)


def test_losses_that_cannot_be_told_apart_by_client_are_not_fused(tmp_path):
    spec = spec_of("token-classification", tmp_path)
    raw = spec.model_dump(exclude_unset=True)
    raw["engine"] = {"fuse": 2}
    with pytest.raises(ValueError, match=r"engine\.fuse: losses of a task of kind token-class"):
        start_run(Recipe.model_validate(raw), tmp_path / "run")


def test_padding_changes_no_score(tmp_path):
    """Rows of unequal lengths score the same one by one and together."""
    for name, (kind, block, row) in CASES.items():
        spec = task_spec(
            kind=block.get("kind", name), **{k: v for k, v in block.items() if k != "kind"}
        )
        task = build_task(spec)
        auto = task.auto_model
        path = tiny(kind, tmp_path / name, auto=auto if name in ("masked-lm", *TARGETS) else None)
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row(i)) for i in range(4)) + "\n"
        )
        tokenizer = tokenizer_of(path)
        torch.manual_seed(3)
        model = getattr(transformers, auto).from_pretrained(path, **task.model_kwargs())
        encode = task.encode_evaluation or task.encode
        rows = encode(read(tmp_path / f"{name}.jsonl"), tokenizer, 120)
        alone, together = (task.evaluate(model, rows, tokenizer, size) for size in (1, 4))
        assert alone == pytest.approx(together, rel=1e-4, abs=1e-5), name
