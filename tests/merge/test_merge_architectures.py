"""Updates added to models that transformers renames, splits or stacks when it loads them."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import build, logits, mean_of, off, reload
from safetensors.torch import load_file, save_file

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.base import merge_into_base
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

WEIGHTS = [3.0, 1.0]
MODEL = "model.safetensors"
EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
PLAIN = {"target_modules": ["q_proj", "down_proj"]}
UNEVEN = {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 7}}


def filled(model, seed):
    """Random factors and heads."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    return model


def adapters(model, base, folder, loaded=None, **config):
    """Two adapters of other ranks, saved by PEFT."""
    made = []
    for i in range(2):
        plain = (loaded or (lambda: reload(model, base)))()
        lora = peft.LoraConfig(r=2 + i, lora_alpha=5, **config)
        filled(peft.get_peft_model(plain, lora), i).save_pretrained(folder / f"a{i}")
        made.append(folder / f"a{i}")
    return made


def planned(folders, **options):
    opened = [open_adapter(str(folder)) for folder in folders]
    return make_plan(opened, options.pop("weights", WEIGHTS), True, **options)


def merged_by_peft(model, base, folders, loaded=None):
    """The model with the mean of the weights that PEFT makes of it with each adapter."""
    load = loaded or (lambda: reload(model, base))
    states = [
        peft.PeftModel.from_pretrained(load(), folder).merge_and_unload().state_dict()
        for folder in folders
    ]
    mean = load()
    mean.load_state_dict(mean_of(states, WEIGHTS))
    return mean


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llava", PLAIN | {"task_type": "CAUSAL_LM"}),  # no model for that task
        ("gemma3", PLAIN | {"task_type": "CAUSAL_LM"}),
        ("qwen2_vl", PLAIN),
        ("nomic_bert", {"target_modules": ["q_proj", "v_proj"]}),  # one tensor on disk, with k
        ("mixtral", EXPERTS | UNEVEN),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "task_type": "CAUSAL_LM"}),
        ("mixtral", {"target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]}),
        ("gpt_oss", EXPERTS),  # stacked on disk, in × out
        ("granitemoe", EXPERTS),
        ("qwen3_vl_moe", EXPERTS),
    ],
)
def test_the_merged_model_says_what_peft_s_own_merges_say(kind, config, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "base")
    folders = adapters(model, tmp_path / "base", tmp_path, **config)
    expected = logits(merged_by_peft(model, tmp_path / "base", folders))
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-6
    assert off(logits(model), expected) > 0.1
    names = [set(load_file(tmp_path / part / MODEL)) for part in ("base", "out")]
    assert names[0] == names[1]
    configs = [(tmp_path / part / "config.json").read_bytes() for part in ("base", "out")]
    assert configs[0] == configs[1]
    # and so does the merged adapter
    merge_adapters(planned(folders), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(reload(model, tmp_path / "base"), tmp_path / "adapter")
    assert off(logits(loaded), expected) < 1e-6
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"]
    assert written["rank_pattern"] == written["alpha_pattern"] == {}


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_square_experts_are_turned_as_the_module_says(kind, tmp_path):
    """Their shape does not tell in × out from out × in."""
    model = build(kind, intermediate_size=16)
    model.save_pretrained(tmp_path / "base")
    folders = adapters(model, tmp_path / "base", tmp_path, **EXPERTS)
    expected = logits(merged_by_peft(model, tmp_path / "base", folders))
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-6


def test_a_rule_that_transformers_does_not_reverse_is_followed_all_the_same(tmp_path):
    """Earlier Qwen3-VL-MoE files hold experts as in × out: they are turned at loading alone."""
    model = build("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "base")
    folders = adapters(model, tmp_path / "base", tmp_path, **EXPERTS)
    expected = logits(merged_by_peft(model, tmp_path / "base", folders))
    file = tmp_path / "base" / MODEL
    turned = {k: t.mT.contiguous() if "experts" in k else t for k, t in load_file(file).items()}
    save_file(turned, file, metadata={"format": "pt"})
    assert off(logits(reload(model, tmp_path / "base")), logits(model)) == 0
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-6
    shapes = [
        {k: t.shape for k, t in load_file(tmp_path / p / MODEL).items()} for p in ("base", "out")
    ]
    assert shapes[0] == shapes[1]


def by_hand(folder, layers, disk, **config):
    """Adapters under the names that modules had when they were called as the tensors on disk are.

    Args:
        layers: Layers, by which tensor on disk they are.

    Returns:
        The folders, and the tensors with the weighted mean of the updates.
    """
    folders, changed = [], {key: t.clone() for key, t in disk.items()}
    for i, weight in enumerate(WEIGHTS):
        g, rank, tensors = torch.Generator().manual_seed(i), 2 + i, {}
        for site, key in layers.items():
            *many, out, inp = disk[key].shape
            n = many[0] if many else 1
            a = 0.3 * torch.randn(n * rank, inp, generator=g)
            b = 0.3 * torch.randn(out, n * rank, generator=g)
            experts = torch.stack([b[:, e::n] @ a[e * rank : (e + 1) * rank] for e in range(n)])
            changed[key] += weight / sum(WEIGHTS) * 5 / rank * experts.reshape(disk[key].shape)
            tensors[f"base_model.model.{site}.lora_A.weight"] = a
            tensors[f"base_model.model.{site}.lora_B.weight"] = b
        (folder / f"a{i}").mkdir()
        save_file(tensors, folder / f"a{i}" / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 5, "target_modules": ["x"]}
        text = json.dumps(fields | {"base_model_name_or_path": "x"} | config)
        (folder / f"a{i}" / "adapter_config.json").write_text(text)
        folders.append(folder / f"a{i}")
    return folders, changed


ON_DISK = {  # patterns of tensors on disk, by the architecture
    "mixtral": r"experts\.\d\.w[123]\.weight|block_sparse_moe\.gate\.weight",
    "qwen3_moe": r"experts\.[12]\.(gate|down)_proj\.weight",  # some of them
    "granitemoe": r"(input|output)_linear\.weight|router\.layer\.weight",
    "llava": r"q_proj\.weight|lm_head\.weight",
    "qwen2_vl": r"layers\.\d\.self_attn\.q_proj\.weight|qkv\.weight",
}


@pytest.mark.parametrize("kind", ON_DISK)
def test_adapters_whose_layers_are_named_as_on_disk(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "base")
    disk = load_file(tmp_path / "base" / MODEL)
    keys = [key for key in disk if re.search(ON_DISK[kind], key)]
    layers = {key.removesuffix(".weight"): key for key in keys}
    stacked = ["input_linear.weight", "output_linear.weight"] if kind == "granitemoe" else None
    folders, changed = by_hand(tmp_path, layers, disk, target_parameters=stacked)
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    got = load_file(tmp_path / "out" / MODEL)
    assert got.keys() == changed.keys() and len(layers) >= 2
    for key, tensor in changed.items():
        assert off(got[key], tensor) < 1e-6 if key in keys else torch.equal(got[key], tensor)
    reload(model, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_an_adapter_of_the_text_model_alone_goes_into_the_whole_one(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "base")
    disk = load_file(tmp_path / "base" / MODEL)
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    layers = {layer: f"language_model.{layer}.weight" for layer in layers}
    folders, changed = by_hand(tmp_path, layers, disk, task_type="CAUSAL_LM")
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    got = load_file(tmp_path / "out" / MODEL)
    assert all(off(got[key], changed[key]) < 1e-6 for key in changed)
    reload(model, tmp_path / "out")


def test_renamed_tensors_keep_their_old_names(tmp_path):
    """BERT's first files call the weights of their normalisations gamma and beta."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / MODEL
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for k, t in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    config = {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}
    folders = adapters(model, tmp_path / "base", tmp_path, **config)
    expected = logits(merged_by_peft(model, tmp_path / "base", folders))
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / MODEL)) == set(old)
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-6


def test_a_shard_for_each_tensor_of_a_group(tmp_path):
    """The experts of a parameter may lie in several files."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    folders = adapters(model, tmp_path / "base", tmp_path, **EXPERTS)
    expected = logits(merged_by_peft(model, tmp_path / "base", folders))
    merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert len(list(Path(tmp_path / "out").glob("*.safetensors"))) > 5
    assert off(logits(reload(model, tmp_path / "out")), expected) < 1e-6


def test_an_expert_that_is_missing_is_named(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    folders = adapters(model, tmp_path / "base", tmp_path, **EXPERTS)
    file = tmp_path / "base" / MODEL
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    missing = r"layers\.1\.mlp\.experts\.gate_up_proj, or not all parts of it"
    with pytest.raises(ValueError, match=missing):
        merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_model_does_not_have_is_named(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    disk = load_file(tmp_path / "base" / MODEL)
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for site, text in (
        ("model.layers.7.self_attn.q_proj", r"has no layer model\.layers\.7\.self_attn\.q_proj"),
        ("model.layers.0.mlp.gates", r"has no layer model\.layers\.0\.mlp\.gates"),
        ("model.layers.0.self_attn.q_proj", r"q_proj is 16 × 16 .* and 24 × 16 in the adapters"),
    ):
        (tmp_path / "case").mkdir(exist_ok=True)
        folder = tmp_path / "case" / str(len(list((tmp_path / "case").iterdir())))
        folder.mkdir()
        folders, _ = by_hand(folder, {site: key}, disk)
        with pytest.raises(ValueError, match=text):
            merge_into_base(planned(folders), str(tmp_path / "base"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
