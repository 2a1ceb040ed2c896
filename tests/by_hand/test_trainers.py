"""Turns that were trained by others: transformers.Trainer and trl, without this package's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from small_runs import oracle, recipe
from tiny import tokenizer_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import fedex_lora
from by_hand.rounds import weights_used
from fedex_lora.runs.by_hand.closing import begin_run, close_round
from fedex_lora.runs.by_hand.opening import open_round
from fedex_lora.runs.export import export_model
from fedex_lora.runs.reopened import open_run

TEXTS = {"ann": ["one two three", "four five"], "bob": ["six seven"], "cleo": ["eight nine ten"]}
ALL = {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "num_train_epochs": 3}
ALL |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}


def started(model: Any, folder: Path) -> PeftModel:
    """What docs/by-hand.md tells those who have PEFT alone."""
    if (folder / "increment").is_dir():
        model = PeftModel.from_pretrained(model, str(folder / "increment")).merge_and_unload()
    return PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)


def hand_back(trainer: Any, folder: Path, examples: int) -> None:
    trainer.save_model(str(folder / "update"))
    (folder / "update/update.json").write_text(json.dumps({"examples": examples}))


def by_trainer(folder: Path, base: Path, texts: list[str], work: Path) -> None:
    """transformers.Trainer on plain PEFT."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    tokenizer = tokenizer_of(base)
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(texts)]
    trainer = Trainer(
        started(model, folder),
        TrainingArguments(str(work), **ALL),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    hand_back(trainer, folder, len(rows))


def by_trl(folder: Path, base: Path, texts: list[str], work: Path) -> None:
    trl = pytest.importorskip("trl")
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = trl.SFTTrainer(
        started(model, folder),
        trl.SFTConfig(str(work), **ALL, gradient_checkpointing=False, bf16=False),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer_of(base),
    )
    trainer.train()
    hand_back(trainer, folder, len(texts))


@pytest.mark.parametrize("kind, train", [("roberta", by_trainer), ("llama", by_trl)])
def test_others_trainers(kind: str, train: Any, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / kind
    begin_run(recipe(tmp_path, kind, records={"save_updates": True}), run)
    results = {}
    for _ in range(2):
        folders = open_round(run).folders
        for client, folder in folders.items():
            train(Path(folder), base, TEXTS[client], tmp_path / "work")
        results = close_round(run, list(folders.values()))
    assert results["rounds"] == 2
    assert weights_used(run) == [{"ann": 0.5, "bob": 0.25, "cleo": 0.25}] * 2
    trained, change = open_run(run, "last"), oracle(run)
    exported = export_model(trained, tmp_path / "out", torch.float32).path
    got = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    weights = dict(got.from_pretrained(exported).named_parameters())
    for name, delta in change.items():
        exact = trained.model.pretrained(name).double() + delta
        weight = next(w for n, w in weights.items() if n.endswith(f"{name}.weight"))
        assert delta.norm() > 1e-2 * exact.norm()  # they did train
        assert (weight.double() - exact).norm() <= 1e-6 * exact.norm()


def test_a_turn_opened_here_is_the_one_that_plain_peft_opens(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "roberta"
    begin_run(recipe(tmp_path, method={"name": "fedex"}), run)
    folders = open_round(run).folders
    for client, folder in folders.items():
        by_trainer(Path(folder), base, TEXTS[client], tmp_path / "work")
    close_round(run, list(folders.values()))
    folder = Path(open_round(run).folders["ann"])
    module, tokenizer = fedex_lora.open_turn(folder)
    model, alone = (
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3) for _ in range(2)
    )
    plain = started(model, folder)
    without = PeftModel.from_pretrained(alone, str(folder / "adapter"))
    bases = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if n.endswith("base_layer.weight")])
        for m in (module, plain, without)
    ]
    assert (bases[0] - bases[1]).norm() < 1e-3 * (bases[0] - bases[2]).norm()  # the increment is in
    ids = tokenizer("one two", return_tensors="pt")
    assert torch.allclose(module.eval()(**ids).logits, plain.eval()(**ids).logits, atol=1e-6)
    needs = {n for n, p in module.named_parameters() if p.requires_grad}
    assert needs == {n for n, p in plain.named_parameters() if p.requires_grad}
