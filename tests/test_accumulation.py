"""Several batches a step come to what one batch of all their rows comes to, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from fedex_lora.engines.trainer import LabelledTrainer
from fedex_lora.engines.training import training_arguments
from fedex_lora.tasks.base import IGNORED

SIZE = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WIDE = {**SIZE, "intermediate_size": 8, "pad_token_id": 0}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
ROWS = 7  # in batches of 2, the last one of 1
CLASS, NUMBER, CLASSES = 1, 0.5, [1.0, 0.0, 1.0]


def model_of(kind: str, auto: str, **more: Any) -> Any:
    fields = {**T5, "dropout_rate": 0.0, "decoder_start_token_id": 0} if kind == "T5" else WIDE
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields, **more)
    return getattr(transformers, f"AutoModelFor{auto}").from_config(config)


def rows(label: Any) -> Dataset:
    """Of one length; where every token has a label, every row has another number of them."""
    torch.manual_seed(1)
    found = []
    for i, ids in enumerate(torch.randint(1, 20, (ROWS, 8)).tolist()):
        own = label if label is not None else [IGNORED] * i + [token % 3 for token in ids[i:]]
        found.append({"input_ids": ids, "labels": own})
    return Dataset.from_list(found)


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def step(
    model: Any, label: Any, folder: Path, batch: int, **more: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one step over all rows."""
    given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4}
    given |= {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
    given |= {"lr_scheduler_type": "constant", **more}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = training_arguments(given, 0, torch.device("cpu"), str(folder))
    trainer = LabelledTrainer(
        model=model, args=args, train_dataset=rows(label), data_collator=collate
    )
    found = trainer.train()
    assert found.global_step == 1
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    return found.training_loss, moved


@pytest.mark.parametrize(
    ("kind", "auto", "label", "more"),
    [
        ("Bert", "SequenceClassification", CLASS, {"num_labels": 3, **STILL}),
        ("Roberta", "SequenceClassification", NUMBER, {"num_labels": 1, **STILL}),
        ("Roberta", "SequenceClassification", -100.0, {"num_labels": 1, **STILL}),
        ("Llama", "SequenceClassification", CLASS, {"num_labels": 3}),
        (
            "Bert",
            "SequenceClassification",
            CLASSES,
            {"num_labels": 3, "problem_type": "multi_label_classification", **STILL},
        ),
        ("Bert", "TokenClassification", None, {"num_labels": 3, **STILL}),
        ("Llama", "TokenClassification", None, {"num_labels": 3}),
        ("Bert", "MaskedLM", None, STILL),
        ("T5", "Seq2SeqLM", None, {}),
        ("Llama", "CausalLM", None, {}),
    ],
)
def test_batches_of_a_step_are_as_one(kind, auto, label, more, tmp_path):
    model = model_of(kind, auto, **more)
    loss, found = step(model, label, tmp_path, batch=2)
    whole_loss, whole = step(model, label, tmp_path, batch=ROWS)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in whole.values())
    assert largest > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(largest))


def test_batches_of_a_step_are_as_one_where_labels_are_smoothed(tmp_path):
    model = model_of("Bert", "TokenClassification", num_labels=3, **STILL)
    smoothed = {"label_smoothing_factor": 0.2}
    loss, _ = step(model, None, tmp_path, batch=2, **smoothed)
    whole_loss, _ = step(model, None, tmp_path, batch=ROWS, **smoothed)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert loss != pytest.approx(step(model, None, tmp_path, batch=2)[0], rel=1e-4)
