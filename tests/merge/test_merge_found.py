# pyright: reportAttributeAccessIssue=false
"""Adapters as people have them: other names of tensors, other places, other ways to begin."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from merging import (
    CLS,
    CONFIG,
    FILE,
    LM,
    PREFIX,
    base,
    bert,
    command,
    edit,
    logits,
    merge,
    plain,
    save,
)
from safetensors.torch import load_file, save_file

from fedex_lora.errors import UserError
from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.base import merge_into_base
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

__all__ = ["base", "bert", "command"]


def rewrite(folder, change):
    """Makes the adapter's tensors what `change` makes of them."""
    save_file(change(load_file(folder / FILE)), folder / FILE)


# names of tensors -----------------------------------------------------------------------------


def with_names(tensors, name="default", prefix=PREFIX):
    """As in `model.state_dict()`."""
    named = {}
    for key, tensor in tensors.items():
        plain_key = key.removeprefix(PREFIX)
        if "lora_embedding" in plain_key:
            plain_key = f"{plain_key}.{name}"
        elif ".lora_" in plain_key:
            plain_key = plain_key.replace(".weight", f".{name}.weight")
        elif plain_key.startswith("classifier."):
            plain_key = plain_key.replace("classifier.", f"classifier.modules_to_save.{name}.")
        named[prefix + plain_key] = tensor
    return named


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX,
        "",
        f"module.{PREFIX}",  # DistributedDataParallel
        f"_orig_mod.{PREFIX}",  # torch.compile
        f"_fsdp_wrapped_module.{PREFIX}",
        PREFIX + PREFIX,
    ],
)
def test_a_plain_state_dict_s_names(bert, prefix, tmp_path):
    merge(bert, tmp_path / "expected", [3, 1])
    for folder in bert:
        rewrite(folder, lambda tensors: with_names(tensors, "hospital", prefix))
    merge(bert, tmp_path / "out", [3, 1])
    expected, got = (load_file(tmp_path / n / FILE) for n in ("expected", "out"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in got)


def test_a_whole_state_dict_s_base_is_left_out_and_that_is_said(bert, command, tmp_path):
    merge(bert, tmp_path / "expected")

    def whole(tensors):
        more = {f"{PREFIX}bert.pooler.dense.weight": torch.ones(2, 2)}
        more[f"{PREFIX}bert.encoder.layer.0.attention.self.query.base_layer.weight"] = (
            more.popitem()[1]
        )
        more |= {f"{PREFIX}classifier.original_module.weight": torch.ones(3, 16)}
        more |= {f"{PREFIX}bert.embeddings.LayerNorm.weight": torch.ones(16)}
        copies = {k: t for k, t in tensors.items() if ".base_layer." not in k}
        return with_names(copies) | more

    for folder in bert:
        rewrite(folder, whole)
    code, out, err = command(*bert, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"3 tensors of the base model that are in {bert[0]}" in out
    got = load_file(tmp_path / "out" / FILE)
    expected = load_file(tmp_path / "expected" / FILE)
    assert got.keys() == {key for key in expected if ".base_layer." not in key}
    assert all(torch.equal(expected[key], got[key]) for key in got)


def test_two_adapters_in_one_file_are_named(bert, command, tmp_path):
    again = {k: t.clone() for k, t in with_names(load_file(bert[0] / FILE), "bob").items()}
    rewrite(bert[0], lambda tensors: with_names(tensors, "ann") | again)
    code, _, err = command(*bert, "--out", tmp_path / "out")
    assert code == 2 and "holds 2 adapters, ann, bob" in err


def test_other_formats_are_named_by_their_tensors(bert, command, tmp_path):
    rewrite(bert[0], lambda t: {"lora_unet_q.lora_down.weight": torch.ones(2, 3)})
    code, _, err = command(*bert, "--out", tmp_path / "out")
    assert code == 2 and "lora_unet_q.lora_down.weight" in err and "lora_A.weight" in err
    save_file({}, bert[0] / FILE)
    code, _, err = command(*bert, "--out", tmp_path / "out")
    assert code == 2 and "it has no tensors" in err


# where they lie -------------------------------------------------------------------------------


def test_an_adapter_in_a_subfolder_is_found_and_several_are_named(bert, command, tmp_path):
    merge(bert, tmp_path / "expected")
    (tmp_path / "outer").mkdir()
    shutil.move(bert[0], tmp_path / "outer" / "hospital")
    code, out, err = command(tmp_path / "outer", bert[1], "--out", tmp_path / "out")
    assert code == 0 and f"Found: {tmp_path}/outer/hospital" in out, err
    expected, got = (load_file(tmp_path / n / FILE) for n in ("expected", "out"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    shutil.copytree(bert[1], tmp_path / "outer" / "checkpoint-500")
    code, _, err = command(tmp_path / "outer", bert[1], "--out", tmp_path / "other")
    assert code == 2 and "outer/checkpoint-500, " in err and "outer/hospital; name one" in err
    file = tmp_path / "outer" / "hospital" / FILE
    code, _, err = command(file, bert[1], "--out", tmp_path / "other")
    assert code == 0, err


def test_an_adapter_in_a_subfolder_of_the_hub(bert, command, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    shutil.copytree(bert[0], hub / "north")
    shutil.copytree(bert[0], tmp_path / "deep/round/2/x")
    asked = []

    def download(name, allow_patterns, revision):
        asked.append((name, allow_patterns))
        return str(hub)

    monkeypatch.setattr("fedex_lora.merge.adapters.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("org/many:north", "org/many"):
        code, _, err = command(name, bert[1], "--out", tmp_path / name.replace("/", "-"))
        assert code == 0, err
    assert asked[0] == ("org/many", [f"north/{CONFIG}", f"north/{FILE}"])
    assert asked[2:] == [("org/many", [f"*/{CONFIG}"]), asked[0]]
    hub = tmp_path / "deep/round"
    code, _, err = command("org/deep", bert[1], "--out", tmp_path / "org-deep")
    assert code == 0, err
    code, _, err = command("org/deep:x", "--out", tmp_path / "no")
    assert code == 2 and "error: org/deep:x: there is no" in err


# how they began -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_ways_to_begin_that_leave_the_base_alone(how, base, tmp_path):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": how}
    model = plain(base("llama"), LM[0])
    before = {k: t.clone() for k, t in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    after = {k.replace(".base_layer.", "."): t for k, t in model.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    for i in (1, 2):
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                g = torch.Generator().manual_seed(i + len(name))
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
        adapted.save_pretrained(tmp_path / f"a{i}")
    stored = json.loads((tmp_path / "a1" / CONFIG).read_text())["init_lora_weights"]
    assert stored == how
    merge([tmp_path / "a1", tmp_path / "a2"], tmp_path / "out", [3, 1])
    files = [load_file(tmp_path / a / FILE) for a in ("a1", "a2")]
    loaded = peft.PeftModel.from_pretrained(plain(base("llama"), LM[0]), tmp_path / "out")
    for layer in range(2):
        site = f"model.layers.{layer}.self_attn.q_proj"
        a, b = ([f[f"{PREFIX}{site}.lora_{x}.weight"].double() for f in files] for x in "AB")
        exact = 6 / 4 * (0.75 * b[0] @ a[0] + 0.25 * b[1] @ a[1])
        got = loaded.get_base_model().get_submodule(site).get_delta_weight("default")
        assert (got - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("how", ["olora", "pissa", "pissa_niter_2"])
def test_ways_to_begin_that_change_the_base_are_refused(how, base, command, tmp_path):
    model = plain(base("llama"), LM[0])
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=how)
    adapted = peft.get_peft_model(model, config)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.base_layer.weight, before)
    adapted.save_pretrained(tmp_path / "a")
    code, _, err = command(tmp_path / "a", "--out", tmp_path / "out")
    text = " ".join(err.split())
    assert code == 2 and f"'{how}', which took B·A out of the base" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize(
    "field, one, other",
    [
        ("layer_replication", [[0, 2], [1, 2]], [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [5, 6], [5, 7]),
    ],
)
def test_where_updates_are_added_is_kept(base, field, one, other, tmp_path):
    """PEFT's model with the merged adapter moves as the mean of both does, linear in ΔW."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    folder, lora = base("llama"), config | {field: one}
    made = [save(folder, LM[0], tmp_path / f"a{i}", i, **lora).folder for i in range(2)]
    merge(made, tmp_path / "out", [3, 1])

    def hidden(adapter):
        model = peft.PeftModel.from_pretrained(plain(folder, LM[0]), adapter).double().eval()
        ids = torch.tensor([[3, 9, 5, 6, 11, 4]])
        extra = {"alora_offsets": [4]} if "alora" in field else {}
        with torch.no_grad():
            return model(input_ids=ids, **extra).logits

    first, second, got = map(hidden, [*made, tmp_path / "out"])
    assert (first - second).norm() > 1e-2 * first.norm()
    assert torch.allclose(got, (3 * first + second) / 4, rtol=1e-5, atol=1e-6)
    edit(made[1], **{field: other})
    with pytest.raises(UserError, match=f"{field}: .*no adapter adds their mean"):
        merge(made, tmp_path / "no", [3, 1])
    with pytest.raises(UserError, match=f"{field}: .*which no plain model has"):
        plan = make_plan([open_adapter(str(made[0]))], None, True)
        merge_into_base(plan, str(folder), tmp_path / "no")


def test_fields_that_change_nothing_are_passed_over(bert, command, tmp_path):
    leftover = {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "lorap_emb_lr": 1e-6}
    edit(bert[0], **leftover)
    code, _, err = command(*bert, "--out", tmp_path / "out")
    assert code == 0, err
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["init_lora_weights"] is True and not leftover.keys() & written.keys()


def test_the_refusal_says_what_a_field_does(bert, command, tmp_path):
    for field, text in (
        ({"use_dora": True}, "use_dora: True, which rescales whole weights (DoRA)"),
        ({"lora_bias": True}, "which trains a bias beside B·A"),
        ({"init_lora_weights": "loftq"}, "'loftq', which put a quantised remainder in place of"),
        ({"init_lora_weights": "EVA"}, "'EVA', which is no way to begin that is known here"),
        ({"use_quantum": 3}, "use_quantum: 3, which is no field of LoRA that is known here"),
    ):
        edit(bert[0], **field)
        code, _, err = command(*bert, "--out", tmp_path / "out")
        assert code == 2 and text in " ".join(err.split())
        edit(bert[0], **dict.fromkeys(field, None))


def test_modules_are_trained_by_the_ends_of_their_names(tmp_path):
    """`classifier`, which PEFT adds for classification, is DistilBERT's pre_classifier too."""
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    lora = {"r": 2, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}
    adapters = [save(tmp_path / "base", CLS[0], tmp_path / f"a{i}", i, **lora) for i in (0, 1)]
    plan = make_plan([open_adapter(str(a.folder)) for a in adapters], [3, 1], True)
    merge_adapters(plan, tmp_path / "out")
    merge_into_base(plan, str(tmp_path / "base"), tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    got = load_file(tmp_path / "out" / FILE)
    names = [n for n in adapters[0].head if n.startswith("pre_classifier")]
    assert len(names) == 2
    for name in adapters[0].head:
        mean = 0.75 * adapters[0].head[name] + 0.25 * adapters[1].head[name]
        for tensor in (got[PREFIX + name], written[name]):
            torch.testing.assert_close(tensor, mean)


def test_biases_are_averaged(base, tmp_path):
    """PEFT's `bias: lora_only` trains the biases of the adapted layers."""
    folders, biases = [], []
    for i in range(2):
        config = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "bias": "lora_only"}
        adapted = peft.get_peft_model(plain(base("gpt2"), LM[0]), peft.LoraConfig(**config))
        g = torch.Generator().manual_seed(i)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name or name.endswith("c_attn.base_layer.bias"):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
        adapted.save_pretrained(tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
        biases.append(
            load_file(folders[i] / FILE)[f"{PREFIX}transformer.h.0.attn.c_attn.base_layer.bias"]
        )
    plan = make_plan([open_adapter(str(f)) for f in folders], [3, 1], True)
    merge_adapters(plan, tmp_path / "out")
    merge_into_base(plan, str(base("gpt2")), tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(plain(base("gpt2"), LM[0]), tmp_path / "out")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    mean = 0.75 * biases[0] + 0.25 * biases[1]
    torch.testing.assert_close(written.transformer.h[0].attn.c_attn.bias, mean)
    path = base("gpt2")
    expected = logits(adapted, path)
    assert (logits(written, path) - expected).norm() <= 2e-6 * expected.norm()


def test_tied_factors_are_merged_apart(base, tmp_path):
    """With `ensure_weight_tying` PEFT trains one pair of factors for embedding and output layer."""
    config = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
        "task_type": "CAUSAL_LM",
    }
    folders = []
    for i in range(2):
        adapted = peft.get_peft_model(plain(base("gemma2"), LM[0]), peft.LoraConfig(**config))
        g = torch.Generator().manual_seed(i)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:  # in place: two of them share their numbers
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
        adapted.save_pretrained(tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
    merge(folders, tmp_path / "out", [3, 1])
    models = [peft.PeftModel.from_pretrained(plain(base("gemma2"), LM[0]), f) for f in folders]
    merged = peft.PeftModel.from_pretrained(plain(base("gemma2"), LM[0]), tmp_path / "out")
    names = [n for n, m in merged.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert {"lm_head", "model.embed_tokens"} <= set(names)
    for name in names:
        one, two, got = (
            m.get_base_model().get_submodule(name).get_delta_weight("default").double()
            for m in (*models, merged)
        )
        exact = 0.75 * one + 0.25 * two
        assert (got - exact).norm() <= 1e-6 * exact.norm()


# tensors that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["factors", "head", "both heads", "base"])
def test_empty_tensors_are_refused_with_their_cause(where, bert, base, command, tmp_path):
    """DeepSpeed ZeRO-3 saves tensors of size [0] where it did not gather them."""
    site = f"{PREFIX}bert.encoder.layer.0.attention.self.query"
    key = f"{site}.lora_A.weight" if where == "factors" else f"{PREFIX}classifier.weight"
    options = []
    if where == "base":
        shutil.copytree(base("bert"), tmp_path / "model")
        file, key = tmp_path / "model" / "model.safetensors", "encoder.layer.1.output.dense.weight"
        save_file(load_file(file) | {key: torch.empty(0)}, file)
        options = ["--into-base", tmp_path / "model"]
    for folder in [] if where == "base" else bert[: 2 if where == "both heads" else 1]:
        rewrite(folder, lambda tensors: tensors | {key: torch.empty(0)})
    code, _, err = command(*bert, *options, "--out", tmp_path / "out")
    text = " ".join(err.split())
    assert code == 2 and f"{key} is empty, of size (0,)" in text
    assert "ZeRO-3" in text and "zero_to_fp32.py" in text
    assert not (tmp_path / "out").exists()


# weights as they are ----------------------------------------------------------------------------
