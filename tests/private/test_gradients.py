"""An example's gradient in a batch is that of the example by itself, for every architecture."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from adapted import CASES, path, random_state
from tiny import TEXT
from torch import Tensor

from fedex_lora.engines.private import gradients as gradients_module
from fedex_lora.engines.private.gradients import check_gradients, gradients, per_example
from fedex_lora.engines.private.losses import example_losses
from fedex_lora.engines.private.train import _backward
from fedex_lora.errors import UserError
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks.base import IGNORED
from fedex_lora.tasks.labelled import frozen_head

__all__ = ["path"]  # a fixture


def batch(model: AdaptedModel, rows: list[int], causal: bool) -> dict[str, Tensor]:
    """Sentences of different lengths, padded to the longest; of a causal model all is predicted."""
    if hasattr(model.tokenizer, "image_mean"):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
        return {"pixel_values": images[rows], "labels": torch.tensor(rows) % 3}
    texts = [TEXT[row][: 12 + 9 * row] for row in rows]
    found = dict(model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right"))
    found.pop("token_type_ids", None)
    if causal:
        real = found["attention_mask"].bool()
        return {**found, "labels": torch.where(real, found["input_ids"], IGNORED)}
    return {**found, "labels": torch.tensor(rows) % 3}


def by_itself(model: AdaptedModel, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of one example's loss as torch takes it, without Opacus."""
    inputs = {name: value for name, value in row.items() if name != "labels"}
    module, labels = model.module.eval(), row["labels"]
    module.zero_grad()
    logits = module(**inputs).logits
    if labels.dim() == 2:
        logits, labels = logits[0, :-1], labels[0, 1:]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_batch_are_those_of_its_rows_by_themselves(name: str, path: Any) -> None:
    case = CASES[name]
    model = case.load(path(case.kind))
    model.write(random_state(model))
    model.freeze(frozenset("AB"))
    causal = case.task["auto_model"] == "AutoModelForCausalLM"
    rows = [0, 1, 2, 3]
    together = gradients(model, batch(model, rows, causal), False)
    alone = [by_itself(model, batch(model, [row], causal)) for row in rows]
    assert together.keys() == alone[0].keys() and len(together) > 4
    for parameter, found in together.items():
        expected = torch.stack([one[parameter] for one in alone])
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-5 * expected.norm(), parameter
    sizes = [sum(g[row].norm() ** 2 for g in together.values()) for row in rows]
    assert min(sizes) > 1e-6
    check = [batch(model, [row], causal) for row in rows], batch(model, rows, causal)
    check_gradients(model, *check, False)
    assert not any(hasattr(p, "grad_sample") for p in model.module.parameters())


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "Causal" in c.task["auto_model"]])
def test_so_they_are_at_labelled_positions_alone(name: str, path: Any) -> None:
    case = CASES[name]
    model = case.load(path(case.kind))
    model.write(random_state(model))
    model.freeze(frozenset("AB"))
    given = batch(model, [0, 1, 2, 3], True)
    given["labels"][:, :4] = IGNORED
    found = []
    for head in (None, frozen_head(model.module, [{"input_ids": given["input_ids"][0].tolist()}])):
        model.module.train()
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with per_example(model):
            _backward(model, dict(given), False, 0.1, head)
            trained = [p for p in model.module.parameters() if p.requires_grad]
            found.append([cast(Any, p).grad_sample.clone() for p in trained])
        model.module.zero_grad(set_to_none=True)
    assert head is not None
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() and one.norm() > 0


def test_an_examples_loss_is_averaged_within_it() -> None:
    """−log p of two tokens and of one, by hand; the one that is not predicted does not count."""
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1, 1]]]).expand(2, 3, 2))
    labels = torch.tensor([[0, 0, 1], [0, IGNORED, 1]])
    found = example_losses(logits, labels)
    log = torch.log(torch.tensor([0.5, 0.75]))
    assert torch.allclose(found, torch.stack([-log.mean(), -log[1]]))
    smoothed = example_losses(logits[:, 1], torch.tensor([0, 1]), smoothing=0.2)
    p = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    assert torch.allclose(smoothed, -(0.9 * p[:, 0].log() + 0.1 * p[:, 1].log()))
    squares = example_losses(torch.tensor([[2.0], [3.0]]), torch.tensor([1.5, 5.0]), True)
    assert squares.tolist() == [0.25, 4.0]


def test_a_model_that_mixes_rows_is_refused(path: Any) -> None:
    case = CASES["roberta"]
    model = case.load(path("roberta"))
    model.write(random_state(model))
    model.freeze(frozenset("AB"))
    rows = [batch(model, [row], False) for row in (0, 1)], batch(model, [0, 1], False)
    layer = model.module.get_submodule("base_model.model.roberta.encoder.layer.0.output")
    handle = layer.register_forward_hook(lambda module, args, y: y - y.mean(0, keepdim=True))
    with pytest.raises(UserError, match=r"depends on the other rows.*target_modules"):
        check_gradients(model, *rows, False)
    handle.remove()
    check_gradients(model, *rows, False)


@pytest.mark.parametrize("size, taken", [(1e-9, True), (1e-5, False)])
def test_a_gradient_that_is_zero_but_for_rounding_depends_on_no_row(
    monkeypatch: pytest.MonkeyPatch, size: float, taken: bool
) -> None:
    """As of the keys' bias, which moves all scores of a softmax alike."""

    def found(model: Any, rows: Any, *more: Any) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(len(rows), 4), "key.bias": size * torch.randn(len(rows), 4)}

    monkeypatch.setattr(gradients_module, "gradients", found)
    model: Any = SimpleNamespace(module=torch.nn.Linear(1, 1))
    with nullcontext() if taken else pytest.raises(UserError, match=r"key\.bias depends on"):
        check_gradients(model, ["a", "b"], "ab", False)  # type: ignore[arg-type]


def test_a_parameter_that_opacus_passes_over_is_refused(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["bert-embedding"]
    model = case.load(path("bert"))
    model.write(random_state(model))
    model.freeze(frozenset("AB"))
    rows = [batch(model, [row], False) for row in (0, 1)], batch(model, [0, 1], False)
    monkeypatch.setattr(model, "embeddings", list)
    with pytest.raises(UserError, match=r"(no gradient by example|cannot take).*embed"):
        check_gradients(model, *rows, False)
