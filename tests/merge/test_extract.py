"""Adapters out of tuned models, against Eckart and Young, and loaded by plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build, logits, reload
from commands import Command
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import TEXT, tiny, tokenizer_of
from transformers import AutoModelForCausalLM

from fedex_lora.errors import UserError
from fedex_lora.merge.extract import best, extract


@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (12, 30)])
def test_the_best_of_a_rank_is_eckart_and_young_s(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    values = 0.7 ** torch.arange(min(shape))
    change = (u * values) @ vh
    optimum = values[4:].norm().item()
    left, right, missed = best(change, 4)
    assert left.shape == (shape[0], 4) and right.shape == (4, shape[1])
    assert missed == pytest.approx((change - left @ right).norm().item())
    assert missed == pytest.approx(optimum, rel=1e-4)
    left, _, missed = best(change, None, 1e-3)
    tails = [values[r:].norm().item() for r in range(len(values))]
    least = next((r for r, t in enumerate(tails) if t <= 1e-3 * tails[0]), len(values))
    assert left.shape[1] == least and missed <= 1.01e-3 * tails[0]


def tuned(base: Path, out: Path, rank: int, tokens: int = 0, embeddings: bool = False) -> Any:
    """The base with a change of that rank in some layers, in several shards."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        model.resize_token_embeddings(tokens)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "c_attn.weight", "down_proj.weight")):
                out_, in_ = weight.shape
                weight += 0.2 * torch.randn(out_, rank) @ torch.randn(rank, in_)
        if embeddings:
            table: Any = model.get_input_embeddings().weight
            table += 0.1 * torch.randn_like(table)
    model.save_pretrained(out, max_shard_size="20KB")
    return model.eval()


@pytest.mark.parametrize(
    "kind, tokens, embeddings",
    [("llama", 0, False), ("gpt2", 0, True), ("gemma2", 330, True), ("llama", 330, True)],
    ids=["llama", "tied", "tied, vocabulary", "vocabulary"],
)
def test_peft_makes_the_tuned_model_of_the_base(
    kind: str, tokens: int, embeddings: bool, tmp_path: Path
) -> None:
    base = tiny(kind, tmp_path / "base")
    model = tuned(base, tmp_path / "tuned", 2, tokens, embeddings)
    done = extract(base, tmp_path / "tuned", tmp_path / "out", 2)
    assert done.rank == 2 and done.error < 1e-5 and not done.left_out
    assert done.vocabulary == (tokens or None)
    plain = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        plain.resize_token_embeddings(tokens)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    ids = tokenizer_of(base)(TEXT[0], return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    assert torch.allclose(again(ids).logits, expected, atol=1e-4 * expected.abs().max().item())


def test_the_base_may_have_older_names_and_buffers(tmp_path: Path) -> None:
    base, out = tiny("gpt2", tmp_path / "base"), tmp_path / "out"
    file = base / "model.safetensors"
    old = {k.removeprefix("transformer."): w for k, w in load_file(file).items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file, {"format": "pt"})
    model = tuned(base, tmp_path / "tuned", 2)
    with torch.no_grad():
        model.transformer.wpe.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    done = extract(base, tmp_path / "tuned", out, 2)
    assert done.error < 1e-5 and done.whole == ("transformer.wpe",)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    ids = torch.arange(3, 12)[None]
    expected = model(ids).logits
    assert torch.allclose(again(ids).logits, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind, head", [("roberta", "classifier"), ("llama", "score")])
def test_a_head_that_the_base_has_not_is_saved_whole(kind: str, head: str, tmp_path: Path) -> None:
    base, out = tiny(kind, tmp_path / "base"), tmp_path / "out"
    cls: Any = transformers.AutoModelForSequenceClassification
    model = cls.from_pretrained(base, num_labels=4, pad_token_id=1).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("output.dense.weight", "q_proj.weight")):
                weight += torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    done = extract(base, tmp_path / "tuned", out, 2)
    assert done.error < 1e-5 and done.whole == (head,)
    plain = cls.from_pretrained(base, num_labels=4, pad_token_id=1)
    again = PeftModel.from_pretrained(plain, str(out)).eval()
    ids = torch.arange(3, 12)[None]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_names_on_disk_are_not_those_of_the_model(tmp_path: Path) -> None:
    model, out = build("llava"), tmp_path / "out"
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                weight += torch.outer(torch.arange(16.0), torch.ones(16)) / 20
    model.save_pretrained(tmp_path / "tuned")
    assert extract(tmp_path / "base", tmp_path / "tuned", out, 1).error < 1e-5
    again = PeftModel.from_pretrained(reload(model, tmp_path / "base"), str(out))
    assert torch.allclose(logits(again), logits(model), atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mixture_s_experts(kind: str, tmp_path: Path) -> None:
    model, out = build(kind), tmp_path / "out"
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # the experts of one layer, one of two parameters of the other
            if weight.ndim == 3 and not name.startswith("model.layers.1.mlp.experts.down"):
                weight += torch.randn(*weight.shape[:2], 2) @ torch.randn(4, 2, weight.shape[2])
    model.save_pretrained(tmp_path / "tuned")
    done = extract(tmp_path / "base", tmp_path / "tuned", out, 2)
    assert done.error < 1e-5 and not done.left_out
    again = PeftModel.from_pretrained(reload(model, tmp_path / "base"), str(out))
    expected = logits(model)
    assert torch.allclose(logits(again), expected, atol=1e-4 * expected.abs().max().item())


def test_a_model_that_does_not_tell_its_embeddings(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    text = small | {"vocab_size": 64, "max_position_embeddings": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=small, projection_dim=8)
    model: Any = transformers.CLIPModel(config)
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.text_projection.weight += torch.outer(torch.arange(8.0), torch.ones(16))
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 1)
    plain: Any = transformers.CLIPModel.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(plain, str(tmp_path / "out")).merge_and_unload()
    assert torch.allclose(again.text_projection.weight, model.text_projection.weight, atol=1e-5)


def test_the_error_is_measured_over_all_that_changed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tiny("llama", tmp_path / "base"), tmp_path / "out"
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    model = tuned(base, tmp_path / "tuned", 3, embeddings=True)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    given: list[Any] = [base, tmp_path / "tuned", "--out", out, "--rank", "1", "--no-embeddings"]
    monkeypatch.chdir(tmp_path.parent)  # one slash in a name may also be a hub id's
    given[:2] = [path.relative_to(tmp_path.parent) for path in given[:2]]
    code, said, told = command("extract", *given)
    assert code == 0 and "2 tensors changed that no adapter holds" in said, told
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    got = dict(adapter.merge_and_unload().named_parameters())
    missed = sum((got[n] - w).norm().item() ** 2 for n, w in model.named_parameters()) ** 0.5
    size = sum((before[n] - w).norm().item() ** 2 for n, w in model.named_parameters()) ** 0.5
    assert f"change: {missed / size:.3g} in total" in said


def test_what_cannot_be_extracted(command: Command, tmp_path: Path) -> None:
    base = tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match="no layer of it differs"):
        extract(base, base, tmp_path / "out", 2)
    other = tiny("llama", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"only one of them has model\.layers\.1"):
        extract(base, other, tmp_path / "out", 2)
    tied = tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UserError, match="tie_word_embeddings: False in"):
        extract(base, tied, tmp_path / "out", 2)
    wider = tiny("llama", tmp_path / "wider", intermediate_size=32)
    with pytest.raises(UserError, match="expected models of one architecture"):
        extract(base, wider, tmp_path / "out", 2)
    gemma = tiny("gemma2", tmp_path / "gemma")
    with pytest.raises(UserError, match=r"is a llama, .* a gemma2"):
        extract(base, gemma, tmp_path / "out", 2)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(
        UserError, match=r"nan: model\.layers\.1\.self_attn\.q_proj\.weight holds NaN"
    ):
        extract(base, tmp_path / "nan", tmp_path / "out", 2)
    (wider / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^[^`]*wider has no model\.safetensors"):
        extract(base, wider, tmp_path / "out", 2)
    code, _, told = command("extract", base, wider, "--out", tmp_path / "out", "--rank", "auto")
    assert code == 2 and "--error" in told and not (tmp_path / "out").exists()
