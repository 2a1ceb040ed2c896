"""Bases that bitsandbytes quantised, and bases as they were in training."""

import json

import peft
import pytest
import torch
import transformers
from architectures import INPUTS, build, logits, off, reload
from merging import command
from safetensors.torch import load_file, save_file

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.base import merge_into_base
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

__all__ = ["command"]


def bits(kind):
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    name, _, double = kind.partition("-")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=bool(double)
    )


def quantised(model, folder, kind):
    options = {"quantization_config": bits(kind), "device_map": {"": "cpu"}}
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, **options)
    for module in loaded.modules():  # some CPUs round the weights once more
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


@pytest.fixture
def made(tmp_path):
    """A function that makes a base, two adapters trained on it in 4 bits, and their merge."""

    def make(architecture, kind):
        model = build(architecture, hidden_size=64, intermediate_size=96)
        model.save_pretrained(tmp_path / "base")
        for i in range(2):
            lora = peft.LoraConfig(r=2 + i, lora_alpha=5, target_modules=["q_proj", "o_proj"])
            adapted = peft.get_peft_model(quantised(model, tmp_path / "base", kind), lora)
            g = torch.Generator().manual_seed(i)
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
            adapted.save_pretrained(tmp_path / f"a{i}")
        plan = make_plan([open_adapter(str(tmp_path / f"a{i}")) for i in (0, 1)], [3, 1], True)
        merge_adapters(plan, tmp_path / "adapter")
        base = quantised(model, tmp_path / "base", kind)
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            return model, plan, logits_of(loaded)

    return make


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("stored", [True, False])
def test_the_merged_model_says_what_peft_says_on_four_bits(kind, stored, made, tmp_path):
    """Whether the files are in 4 bits, or the base was only loaded so."""
    model, plan, expected = made("llama", kind)
    if stored:
        quantised(model, tmp_path / "base", kind).save_pretrained(tmp_path / "small")
    name = str(tmp_path / ("small" if stored else "base"))
    done = merge_into_base(plan, name, tmp_path / "out", quantised=None if stored else kind)
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("was quantised" in note for note in done.notes) == stored
    # on the base as it is the adapters say something else
    merge_into_base(plan, str(tmp_path / "base"), tmp_path / "plain")
    assert off(logits(reload(model, tmp_path / "plain")), expected) > 0.01


def test_a_mixture_of_experts_in_four_bits(made, tmp_path):
    model, plan, expected = made("mixtral", "nf4")
    quantised(model, tmp_path / "base", "nf4").save_pretrained(tmp_path / "small")
    merge_into_base(plan, str(tmp_path / "small"), tmp_path / "out")
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-5


def test_eight_bits_are_their_rows_times_their_scales(made, tmp_path):
    model, plan, _ = made("llama", "int8")
    quantised(model, tmp_path / "base", "int8").save_pretrained(tmp_path / "small")
    done = merge_into_base(plan, str(tmp_path / "small"), tmp_path / "out")
    packed, got = (load_file(tmp_path / part / "model.safetensors") for part in ("small", "out"))
    key = "model.layers.0.mlp.up_proj.weight"  # not adapted
    scales = packed[key.replace("weight", "SCB")]
    assert torch.equal(got[key], packed[key].float() * (scales / 127)[:, None])
    assert any("rounded their inputs" in note for note in done.notes)
    reload(model, tmp_path / "out")


def test_what_else_is_quantised_is_refused_with_its_reason(made, command, tmp_path):
    made("llama", "nf4")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, file)
    options = ["--into-base", tmp_path / "base", "--out", tmp_path / "out"]
    code, _, err = command(tmp_path / "a0", *options)
    assert code == 2 and f"{key} in {file} has dtype F8_E4M3" in err and "not undone" in err
    code, _, err = command(tmp_path / "a0", "--base-quantised", "nf4", "--out", tmp_path / "out")
    assert code == 2 and "goes with --into-base" in err
    code, _, err = command(tmp_path / "a0", *options, "--base-quantised", "int3")
    assert code == 2 and "one of nf4, nf4-double, fp4, fp4-double" in err
    assert not (tmp_path / "out").exists()
