"""Rows packed into one sequence are learned as they are one by one."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset
from small_runs import recipe
from tiny import TEXT, tiny, tokenizer_of
from transformers.modeling_outputs import CausalLMOutput

from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Turn
from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task

# Mistral's window is shorter than the rows are
KINDS = [("gpt2", "sdpa"), ("llama", "sdpa"), ("mistral", "sdpa"), ("mistral", "eager")]
KINDS += [("gemma2", "eager")]
SPEC = {"kind": "instruction", "prompt": "{q}: ", "response": "{a}"}


def encoded(task, tokenizer):
    rows = {"q": [TEXT[0], "dog?", TEXT[2]], "a": ["fox", TEXT[1], TEXT[3]]}
    return task.encode(Dataset.from_dict(rows), tokenizer, 120)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_loss_and_gradient_are_those_of_padded_rows(kind, attention, tmp_path):
    path = tiny(kind, tmp_path / kind)
    tokenizer = tokenizer_of(path)
    found = []
    for packing in (False, True):
        task = build_task(task_spec(**SPEC, packing=packing))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=attention, use_cache=False
        )
        rows = encoded(task, tokenizer)
        batch = task.collator(tokenizer)([rows[i] for i in range(3)])
        assert ("position_ids" in batch, len(batch["input_ids"])) == (packing, 1 if packing else 3)
        loss = model(**batch).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient.double()))
        if packing:
            assert task.check_training is not None
            task.check_training(model, rows)
    (alone, wanted), (together, gradient) = found
    assert together == pytest.approx(alone, rel=1e-6)
    assert (gradient - wanted).norm() / wanted.norm() < 1e-5


def test_a_client_ends_where_it_ends_with_padding(tmp_path):
    ends = []
    for packing in (False, True):
        task = {"kind": "causal-lm", "packing": packing}
        federation = set_up(recipe(tmp_path, "llama", task=task))
        train = HFTrainer(federation.task, federation.recipe.training)
        turn = Turn("ann", 1, federation.clients["ann"], federation.initial, frozenset("AB"), 0)
        (trained,) = train(federation.model, [turn])
        ends.append((trained.metrics["loss"], trained.metrics["steps"], trained.end.layers))
    (alone, steps, wanted), (together, same, found) = ends
    assert together == pytest.approx(alone, rel=1e-5) and steps == same == 3
    for name, end in wanted.items():
        torch.testing.assert_close(found[name].B, end.B, rtol=1e-3, atol=1e-5)
    assert max(end.B.abs().max() for end in wanted.values()) > 1e-2


class Mixing(torch.nn.Module):
    """Every token's logits depend on all tokens before it, whosever row they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids, position_ids):
        logits = self.weight * input_ids.cumsum(1).float()[..., None]
        return CausalLMOutput(logits=logits)


class Blind(torch.nn.Module):
    """A model that takes no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids):
        raise AssertionError


@pytest.mark.parametrize(("model", "why"), [(Mixing(), "change by"), (Blind(), "unexpected key")])
def test_a_model_that_would_mix_rows_is_refused(model, why):
    task = build_task(task_spec(**SPEC, packing=True))
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]})
    assert task.check_training is not None
    with pytest.raises(
        UserError, match=rf"task\.packing: this model cannot keep rows apart.*{why}"
    ):
        task.check_training(model, rows)


def test_packed_rows_are_not_fused(tmp_path):
    task = {"kind": "causal-lm", "packing": True}
    with pytest.raises(ValueError, match=r"engine\.fuse: .*task\.packing"):
        recipe(tmp_path, "llama", task=task, engine={"fuse": 2})
