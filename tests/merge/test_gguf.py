"""GGUF files against other readers: transformers' own, and the library's with rows put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import TEXT, tiny, tokenizer_of
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

gguf = pytest.importorskip("gguf")

from fedex_lora.errors import UserError  # noqa: E402
from fedex_lora.merge.llama_cpp import write as module  # noqa: E402
from fedex_lora.merge.llama_cpp.architecture import architecture, describe  # noqa: E402
from fedex_lora.merge.llama_cpp.write import write_adapter, write_model  # noqa: E402


def adapter(base: Path, out: Path, **lora: Any) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(out)
    return out


def read(path: Path) -> dict[str, torch.Tensor]:
    found = gguf.GGUFReader(path).tensors
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in found}


def put_back(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of pairs as rows of halves, one by one."""
    size, back = rows.shape[0] // heads, torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            back[head * size + i] = rows[head * size + 2 * i]
            back[head * size + i + size // 2] = rows[head * size + 2 * i + 1]
    return back


def qwen2(folder: Path) -> Path:
    """With biases, and heads whose rows stay as they are."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, eos_token_id=2, bos_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_the_model(kind: str, tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / kind)
    folder = qwen2(folder) if kind == "qwen2" else folder
    done = write_model(folder, tmp_path / "m.gguf", "f32")
    assert done.rounding == 0 and done.tensors == len(read(done.path))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = tokenizer_of(folder)(TEXT[0], return_tensors="pt")["input_ids"]
    assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)
    fields = gguf.GGUFReader(done.path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = tokenizer_of(folder).get_vocab()
    assert all(tokens[number] == token for token, number in vocabulary.items() if number < 300)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_half_precision_is_told_and_what_it_does_not_hold_refused(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "llama")
    done = write_model(folder, tmp_path / "m.gguf")
    assert 1e-4 < done.rounding < 4e-3  # of bfloat16, 2⁻⁹ at most
    with pytest.raises(UserError, match="is there already"):
        write_model(folder, tmp_path / "m.gguf")
    tensors = lambda: [("w", torch.full((2, 2), 1e5))]  # noqa: E731
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(UserError, match="entries that float16 does not hold"):
        module._written(writer, tensors, tmp_path / "h.gguf", "f16")
    assert not (tmp_path / "h.gguf").exists()


def test_an_adapter_s_change_is_peft_s(command: Command, tmp_path: Path) -> None:
    base = tiny("llama", tmp_path / "llama")
    made = adapter(
        base,
        tmp_path / "a",
        r=2,
        lora_alpha=3,
        rank_pattern={"k_proj": 3},
        target_modules=["q_proj", "k_proj", "down_proj"],
    )
    out = tmp_path / "a.gguf"
    code, said, told = command("gguf", made, "--out", out, "--base", base)
    assert code == 0 and "12 tensors, read back and equal" in said, told
    got, stored = read(out), load_file(made / "adapter_model.safetensors")
    fields = gguf.GGUFReader(out).fields
    assert fields["general.type"].contents() == "adapter"
    alpha = fields["adapter.lora.alpha"].contents()
    layer = "base_model.model.model.layers.1."
    for theirs, ours, heads, rank in (
        ("self_attn.q_proj", "attn_q", 4, 2),
        ("self_attn.k_proj", "attn_k", 2, 3),
        ("mlp.down_proj", "ffn_down", 0, 2),
    ):
        a, b = (got[f"blk.1.{ours}.weight.lora_{x}"] for x in "ab")
        change = alpha / b.shape[1] * b @ a  # as llama.cpp does
        if heads:
            change = put_back(change, heads)
        factors = [stored[f"{layer}{theirs}.lora_{x}.weight"] for x in "AB"]
        expected = 3 / rank * factors[1] @ factors[0]
        assert torch.allclose(change, expected, atol=1e-5)


def test_what_has_no_name_is_refused_by_name(tmp_path: Path) -> None:
    gpt2, llama = tiny("gpt2", tmp_path / "gpt2"), tiny("llama", tmp_path / "llama")
    with pytest.raises(UserError, match="GPT2LMHeadModel: GGUF is written of LlamaForCausalLM"):
        write_model(gpt2, tmp_path / "m.gguf")
    heads = adapter(
        llama, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with pytest.raises(UserError, match=r"lm_head.weight: GGUF has factors of linear layers"):
        write_adapter(heads, tmp_path / "a.gguf", str(llama))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"cannot be read; name its base model with `base`: [^\n]+$"
    ):
        write_adapter(heads, tmp_path / "a.gguf", str(tmp_path))
    config = AutoModelForCausalLM.from_pretrained(llama).config
    with pytest.raises(UserError, match=r"rotor\.weight: llama\.cpp has no name for it"):
        architecture(config).tensor("model.layers.0.rotor.weight")
    known = json.loads((llama / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    known["pre_tokenizer"] = split
    (llama / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"cuts texts by \[.x.\]"):
        write_model(llama, tmp_path / "m.gguf")
    assert write_model(llama, tmp_path / "m.gguf", pre="mine").tensors


def test_llama_3_s_frequencies_are_transformers_s() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=1, rope_parameters=rope,
        intermediate_size=8, vocab_size=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    theirs = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    factors = describe(gguf.GGUFWriter(None, "llama"), architecture(config), "x")
    assert factors is not None and factors.unique().numel() > 2
    assert torch.allclose(plain / factors, theirs, rtol=1e-5)
