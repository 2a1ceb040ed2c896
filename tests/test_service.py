"""Predictions and conversations of finished models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from small_runs import recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    task = {
        "kind": "instruction",
        "prompt": "Q: {text} A:",
        "response": " {label}",
        "max_length": 64,
    }
    start_run(
        recipe(folder, "llama", federation={"clients": 3, "rounds": 1}, task=task), folder / "run"
    )
    return folder


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_classes_of_rows_without_labels(
    command: Command, small_run: tuple[Path, Any], tmp_path: Path
) -> None:
    run, _ = small_run
    texts = ["The quick brown fox.", "Sockets send bytes", "a"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = tmp_path / "out.jsonl"
    code, said, _ = command("predict", run, "--data", tmp_path / "in.jsonl", "--out", out)
    assert code == 0 and "3 predictions" in said
    exported = export_model(open_run(run), tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(exported.path).eval()
    tokenizer = open_run(run).model.tokenizer
    for text, row in zip(texts, rows_of(out), strict=True):
        p = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert row["text"] == text and row["prediction"] == "xyz"[int(p.argmax())]
        assert row["probability"] == pytest.approx(p.max().item(), abs=1e-5)
    # the same of the adapter, into another kind of file
    adapter = export_adapter(open_run(run), tmp_path / "adapter").path
    sets = ["--set", f"model.name={run.parent / 'roberta'}", "--set", "task.labels=[x, y, z]"]
    given = ["--task", "text-classification", "--data", tmp_path / "in.jsonl", *sets]
    code, _, told = command("predict", adapter, *given, "--out", tmp_path / "out.csv")
    assert code == 0, told
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "text,prediction,probability" and len(lines) == 4


def test_what_predict_refuses(
    command: Command, small_run: tuple[Path, Any], tmp_path: Path
) -> None:
    run, file = small_run[0], tmp_path / "in.jsonl"
    file.write_text('{"words": "x"}\n')
    for out, why in (("o.xls", "expected a file of one of"), ("in.jsonl", "is there already")):
        code, _, told = command("predict", run, "--data", file, "--out", tmp_path / out)
        assert code == 2 and why in told
    code, _, told = command("predict", run, "--data", file, "--out", tmp_path / "o.csv")
    assert code == 2 and "no column 'text'" in told
    file.write_text('{"text": "x", "prediction": 1}\n')
    code, _, told = command("predict", run, "--data", file, "--out", tmp_path / "o.csv")
    assert code == 2 and "a column 'prediction' already" in told
    code, _, told = command("chat", run, "--prompt", "hello")
    assert code == 2 and "fedex-lora predict" in told and not (tmp_path / "o.csv").exists()


def test_texts_and_conversations(
    command: Command, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file, out = decoder / "run", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["The quick brown fox", "lines " * 90, "Dates and times"]  # one has no room
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    given = ["--data", file, "--out", out, "--max-new-tokens", "6"]
    code, said, told = command("predict", run, *given)
    assert code == 0 and "1 of 3 rows have none" in said, told
    model = AutoModelForCausalLM.from_pretrained(
        export_model(open_run(run), tmp_path / "model").path
    ).eval()
    tokenizer = open_run(run).model.tokenizer
    expected = []
    for text in (texts[0], texts[2]):
        ids = tokenizer(f"Q: {text} A:", return_tensors="pt")["input_ids"]
        for _ in range(6):  # greedily, by hand
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        new = ids[0, -6:].tolist()
        new = new[: new.index(2)] if 2 in new else new
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert [row["prediction"] for row in rows_of(out)] == [expected[0], None, expected[1]]
    code, said, _ = command("chat", run, "--prompt", texts[0], "--max-new-tokens", "6")
    assert code == 0 and said.rstrip("\n").endswith(expected[0].strip())
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{texts[0]}\n/reset\n{texts[2]}\n/exit\nx\n"))
    code, said, _ = command("chat", run, "--max-new-tokens", "6")
    assert code == 0 and said.strip() == "\n".join(e.strip() for e in expected).strip()
    code, _, told = command("chat", run, "--prompt", "x", "--system", "be brief")
    assert code == 2 and "no chat template" in told
