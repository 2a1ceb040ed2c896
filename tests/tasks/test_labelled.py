"""Losses at labelled positions: the Trainer's, and their gradients, for models of many kinds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from fedex_lora.engines.training import LabelledTrainer, quick_collections, training_arguments
from fedex_lora.tasks import labelled, shared
from fedex_lora.tasks.base import IGNORED

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZE, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {**WIDE, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
GEMMA = {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 6}
LAYERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Llama": (GROUPED, ["q_proj", "v_proj"]),
    "GPT2": (GPT2, ["c_attn"]),
    "Gemma2": ({**GEMMA, "final_logit_softcapping": 2.0}, ["q_proj", "v_proj"]),
    "Gemma3Text": ({**GEMMA, "sliding_window": 4}, ["q_proj", "v_proj"]),
    "Qwen2": (GROUPED, ["q_proj", "v_proj"]),
    "Mistral": ({**GROUPED, "sliding_window": 4}, ["q_proj", "v_proj"]),
    "Phi": (WIDE, ["q_proj", "v_proj"]),
    "OPT": (
        {**SIZE, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        ["q_proj", "v_proj"],
    ),
    "GPTNeoX": (WIDE, ["query_key_value"]),
    "GPTNeo": (
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ["q_proj", "v_proj"],
    ),
    "Bloom": (
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        ["query_key_value"],
    ),
    "Cohere": ({**GROUPED, "logit_scale": 0.25}, ["q_proj", "v_proj"]),
    "Granite": ({**GROUPED, "logits_scaling": 3.0}, ["q_proj", "v_proj"]),
    "Mixtral": ({**GROUPED, **EXPERTS}, ["q_proj", "v_proj"]),
    "Mamba": ({**SIZE, "state_size": 4}, ["in_proj"]),
}


def model_of(kind: str, **more: Any) -> Any:
    fields, targets = LAYERS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far enough from zero that a scale of logits shows
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.config.use_cache = False
    lora = LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False, **more})
    return get_peft_model(model, lora)


ROWS = [
    ([5, 7, 9, 11, 4, 6], 4),
    ([8, 3, 4, 12], 1),
    ([5, 6, 7, 8, 9, 10, 11, 3], 6),
    ([9, 9, 2], 1),
]

AS_ONE = {"per_device_train_batch_size": len(ROWS), "gradient_accumulation_steps": 1}
PLAIN: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2, pad_token_type_id=0)
LABELLED = sum(len(ids) - first for ids, first in ROWS)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for key, fill in filled.items()
    }


def rows() -> Dataset:
    """Some with labels on most tokens, some on one, and of different lengths."""
    return Dataset.from_list(
        [
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [IGNORED] * first + ids[first:],
            }
            for ids, first in ROWS
        ]
    )


def gradients(
    trainer: type[Trainer], model: Any, folder: Any, **training: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of the first step, which two batches are accumulated for."""
    given = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        **training,
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = training_arguments(given, 0, torch.device("cpu"), str(folder))
    found = trainer(model=model, args=args, train_dataset=rows(), data_collator=collate).train()
    after = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.copy_(before[name])
    return found.training_loss, {n: before[n] - after[n] for n in before}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_collections():
        yield


@pytest.fixture
def chunks(monkeypatch) -> list[int]:
    """At how many positions logits are computed, by call; of a batch at three at most at a time."""
    monkeypatch.setattr(labelled, "ROOM", 40 * 3)
    found: list[int] = []
    whole = labelled.Head.logits

    def counted(self: labelled.Head, states: Tensor, output: Any) -> Tensor:
        found.append(len(states))
        return whole(self, states, output)

    monkeypatch.setattr(labelled.Head, "logits", counted)
    return found


def assert_as_trainer(model: Any, folder: Any, chunks: list[int], **training: Any) -> None:
    loss, found = gradients(LabelledTrainer, model, folder, **training)
    assert sum(chunks[1:]) == LABELLED and max(chunks[1:]) <= 3  # the first one tries the model
    own_loss, own = gradients(Trainer, model, folder, **training)
    assert loss == pytest.approx(own_loss, rel=1e-5)
    for name, gradient in own.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_a_score_that_is_a_loss_alone_needs_no_other_logits(tmp_path, chunks):
    model = model_of("Llama")
    args = training_arguments({"per_device_eval_batch_size": 3}, 0, torch.device("cpu"), tmp_path)

    def loss(kind: type[Trainer], **more: Any) -> float:
        trainer = kind(model=model, args=args, data_collator=collate, **more)
        return trainer.evaluate(rows())["eval_loss"]

    own = loss(Trainer)
    assert loss(LabelledTrainer) == pytest.approx(own, rel=1e-5)
    assert sum(chunks[1:]) == LABELLED
    chunks.clear()
    assert loss(LabelledTrainer, compute_metrics=lambda _: {}) == own and not chunks


@pytest.mark.parametrize("kind", LAYERS)
def test_losses_and_gradients_are_the_trainers(kind, tmp_path, chunks):
    assert_as_trainer(model_of(kind), tmp_path, chunks)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2"])
def test_with_labels_that_are_smoothed(kind, tmp_path, chunks):
    assert_as_trainer(model_of(kind), tmp_path, chunks, label_smoothing_factor=0.3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_with_a_head_that_is_trained(smoothing, tmp_path, chunks):
    model = model_of("Llama", modules_to_save=["lm_head"])
    assert_as_trainer(model, tmp_path, chunks, label_smoothing_factor=smoothing)


def test_with_a_head_that_is_adapted(tmp_path, chunks):
    model = model_of("Granite", target_modules=["q_proj", "lm_head"])
    assert_as_trainer(model, tmp_path, chunks)


@pytest.mark.parametrize("kind", ["GPT2", "Gemma2"])
def test_with_everything_trained_and_tied_embeddings(kind, tmp_path, chunks):
    model = model_of(kind).unload()
    model.requires_grad_(True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_as_trainer(model, tmp_path, chunks)


def test_with_a_vocabulary_that_was_enlarged(tmp_path, chunks):
    model = model_of("Llama")
    model.get_base_model().resize_token_embeddings(51, mean_resizing=False)
    assert_as_trainer(model, tmp_path, chunks)


def test_rounding_is_no_larger_than_the_trainers(tmp_path):
    """Against float64, in float32 and under autocast to bfloat16."""
    exact = gradients(Trainer, model_of("Gemma2").double(), tmp_path)[1]
    for half in (False, True):
        errors = [
            sum((found[name] - exact[name]).square().sum().item() for name in exact)
            for found in (
                gradients(kind, model_of("Gemma2"), tmp_path, bf16=half)[1]
                for kind in (LabelledTrainer, Trainer)
            )
        ]
        assert 0 < errors[0] <= 1.5 * errors[1]


class OwnLossForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        if output.loss is not None:
            output.loss = output.loss + 0.1 * output.logits.square().mean()
        return output


class UnshiftedForCausalLM(transformers.LlamaForCausalLM):
    """As BART's decoder: labels are those of the next tokens already."""

    def forward(self, *args: Any, labels: Any = None, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        if labels is not None:
            output.loss = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


class OwnHeadForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        output.logits = output.logits + inputs["input_ids"][..., None]
        return output


@pytest.mark.parametrize(
    "kind, reason",
    [
        (OwnLossForCausalLM, "its loss is one of its own"),
        (OwnHeadForCausalLM, "cannot be run by itself"),
    ],
)
def test_where_it_does_not_apply_the_trainers_way_is_gone(kind, reason, tmp_path, caplog):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**GROUPED))
    with caplog.at_level(logging.WARNING, labelled.logger.name):
        found = gradients(LabelledTrainer, model, tmp_path, **AS_ONE)
    said = [r.getMessage() for r in caplog.records if r.name == labelled.logger.name]
    assert len(said) == 1 and reason in said[0] and kind.__name__ in said[0]
    own = gradients(Trainer, model, tmp_path, **AS_ONE)
    assert found[0] == own[0] and all(found[1][n].equal(own[1][n]) for n in own[1])


def test_a_model_whose_labels_are_not_shifted_learns_the_next_token(tmp_path):
    losses = []
    for kind, trainer in (
        (transformers.LlamaForCausalLM, Trainer),
        (UnshiftedForCausalLM, LabelledTrainer),
    ):
        torch.manual_seed(0)
        losses.append(gradients(trainer, kind(transformers.LlamaConfig(**GROUPED)), tmp_path))
    (own_loss, own), (loss, found) = losses
    assert loss == pytest.approx(own_loss, rel=1e-5)
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_experts_that_add_a_loss_of_theirs_are_left_to_the_trainer(tmp_path, chunks):
    model = model_of("Mixtral")
    model.get_base_model().config.output_router_logits = True
    found, own = (gradients(kind, model, tmp_path, **AS_ONE) for kind in (LabelledTrainer, Trainer))
    assert len(chunks) == 1 and found[0] == own[0]


def test_losses_by_row_without_gradients():
    model = model_of("Qwen2").eval()
    batch = collate([dict(row) for row in rows()])
    labels = batch.pop("labels")
    with torch.no_grad():
        head = labelled.head_of(model, batch["input_ids"])
        assert head is not None
        sums, counts = labelled.token_losses(head, batch, labels).by_row(len(ROWS))
        log_p = model(**batch).logits.double().log_softmax(-1)
    for row, (ids, first) in enumerate(ROWS):
        expected = -sum(log_p[row, i - 1, ids[i]].item() for i in range(first, len(ids)))
        assert sums[row] == pytest.approx(expected, rel=1e-5) and counts[row] == len(ids) - first


def test_a_prompt_is_not_shared_where_padding_shows(monkeypatch, caplog):
    """By the group with the longest rest, whose prompt is the longest, alone it would not."""
    model, tokenizer = model_of("GPT2").eval(), PLAIN
    groups = [
        [
            {"input_ids": [*p, 6, 7, end], "labels": [IGNORED] * len(p) + [6, 7, end]}
            for end in (3, 4)
        ]
        for p in ([5, 7, 9, 11], [8, 3])
    ]
    monkeypatch.setattr(shared, "_positions", lambda body, places: {})
    with caplog.at_level(logging.WARNING, shared.logger.name):
        found = shared.continuation_losses(model, groups, tokenizer, 6)
    assert "other scores than without" in caplog.text
    assert found == shared._apart(model, groups, tokenizer, 6)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_prompt_shared_by_its_continuations_gives_the_same_losses(kind, caplog):
    model = model_of(kind).eval()
    tokenizer = PLAIN
    prompts = [[5, 7, 9, 11, 4, 6, 8, 10], [8, 3, 4], [9, 12]]
    ends = [[[6, 7, 8], [6, 7, 9, 2], [6, 5]], [[3], [4]], [[10, 11, 12, 13, 3]]]
    groups = [
        [{"input_ids": p + e, "labels": [IGNORED] * len(p) + e} for e in given]
        for p, given in zip(prompts, ends)
    ]
    groups.insert(1, [])
    expected = shared._apart(model, groups, tokenizer, 2)
    with caplog.at_level(logging.WARNING, shared.logger.name):
        found = shared.continuation_losses(model, groups, tokenizer, 6)
    assert [len(group) for group in found] == [3, 0, 2, 1]
    for group, own in zip(found, expected):
        assert [count for _, count in group] == [count for _, count in own]
        assert [loss for loss, _ in group] == pytest.approx([loss for loss, _ in own], rel=2e-5)
    said = [r for r in caplog.records if r.name == shared.logger.name]
    assert bool(said) == (kind == "Mamba")  # which has no cache of that kind
