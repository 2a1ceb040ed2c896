"""Adapters and merged models on disk, read by plain PEFT and transformers."""

import json

import peft
import pytest
import torch
import transformers
from adapted import CASES, assert_equal, batch, increments, logits, path, random_state
from safetensors.torch import load_file, save_file
from tiny import tiny

from fedex_lora.aggregation.adapter import AdapterState, Factors, uniform
from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.model.adapted import load_model
from fedex_lora.recipe import LoraSpec, ModelSpec

__all__ = ["path"]
NAMES = pytest.mark.parametrize("name", list(CASES))


def plain(case, folder):
    auto = getattr(transformers, case.task["auto_model"])
    model = auto.from_pretrained(folder, **case.task["model_kwargs"])
    if getattr(model.config, "pad_token_id", 0) is None:  # images have none
        model.config.pad_token_id = model.config.eos_token_id
    return model


def uneven(model):
    """A state with another rank and scale at every site, rank 0 among them."""
    state = random_state(model)
    layers = {}
    for i, (name, f) in enumerate(state.layers.items()):
        rank = i % 4
        g = torch.Generator().manual_seed(i)
        a = torch.randn(rank, f.A.shape[1], generator=g)
        layers[name] = Factors(a, 0.1 * torch.randn(f.B.shape[0], rank, generator=g), 1.0 + i / 7)
    return AdapterState(layers, state.head)


@NAMES
@pytest.mark.parametrize("make", [random_state, uneven])
def test_plain_peft_loads_a_saved_adapter(name, make, path, tmp_path):
    case = CASES[name]
    model = case.load(path(case.kind))
    state = make(model)
    model.save_adapter(state, tmp_path / "a", base_name=str(path(case.kind)))
    loaded = peft.PeftModel.from_pretrained(plain(case, path(case.kind)), tmp_path / "a")
    model.write(state)
    inputs = batch(model)
    assert torch.allclose(logits(loaded, inputs), logits(model.module, inputs), atol=1e-5)


def test_a_saved_adapter_names_the_base_and_is_the_same_every_time(path, tmp_path):
    case = CASES["mistral"]
    model = case.load(path("mistral"))
    state = random_state(model)
    for name in ("a", "b"):
        model.save_adapter(state, tmp_path / name, base_name="org/model")
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    assert config == (tmp_path / "b" / "adapter_config.json").read_text()
    fields = json.loads(config)
    assert fields["base_model_name_or_path"] == "org/model"
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert (fields["r"], fields["use_rslora"]) == (3, False)
    assert fields["lora_alpha"] == pytest.approx(5 * 3**0.5)  # 5 / √3 as alpha / r
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}


@NAMES
def test_plain_transformers_loads_a_merged_model(name, path, tmp_path):
    case = CASES[name]
    model = case.load(path(case.kind))
    state, added = uneven(model), increments(model)
    model.merged(state, added.get).save_pretrained(tmp_path / "m")
    model.write(state)
    model.place(added.get)
    inputs = batch(model)
    loaded = plain(case, tmp_path / "m")
    assert torch.allclose(
        logits(loaded, inputs), logits(model.module, inputs), rtol=1e-4, atol=1e-5
    )
    assert not any("lora" in k or "base_layer" in k for k in loaded.state_dict())
    own = plain(case, path(case.kind)).config
    assert getattr(loaded.config, "use_cache", None) is getattr(own, "use_cache", None)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama-embedding"])
def test_a_merged_weight_is_rounded_once(name, path):
    case = CASES[name]
    model = case.load(path(case.kind), dtype="bfloat16")
    state, added = random_state(model), increments(model)
    model.place(added.get)  # where the model stands has no influence
    half = model.merged(state, added.get)
    full = model.merged(state, added.get, torch.float32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for site in model.layers:
        w = full.get_submodule(site).weight
        assert w.dtype == torch.float32
        assert torch.equal(half.get_submodule(site).weight, w.bfloat16())
        assert not torch.equal(w, w.bfloat16().float())
    for key, value in state.head.items():
        assert torch.equal(full.get_parameter(key), value)


@NAMES
def test_a_run_can_start_from_a_saved_adapter(name, path, tmp_path):
    case = CASES[name]
    model = case.load(path(case.kind))
    state = random_state(model)
    model.save_adapter(state, tmp_path / "a", base_name=str(path(case.kind)))
    again = case.load(path(case.kind), lora={"init": tmp_path / "a"}, seed=5)
    assert_equal(again.initial(5), state)


def test_a_run_can_start_from_padded_factors(path, tmp_path):
    """At the rank with the padding and, where only zeros go, at that without."""
    case = CASES["llama"]  # k_proj has rank 2, the others 3
    lora = {"lora_alpha": 3, "alpha_pattern": {"k_proj": 2}}  # scale 1 everywhere
    model = case.load(path("llama"), lora=lora)
    state = random_state(model)
    padded = AdapterState(uniform(state.layers), state.head)
    model.save_adapter(padded, tmp_path / "a", base_name="org/model")
    again = case.load(path("llama"), lora={**lora, "init": tmp_path / "a"})
    assert_equal(again.initial(0), state)
    whole = {"rank_pattern": {}, "alpha_pattern": {}, "lora_alpha": 3}
    again = case.load(path("llama"), lora={**whole, "init": tmp_path / "a"})
    assert_equal(again.initial(0), padded)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama-embedding"])
def test_a_run_can_start_from_an_adapter_that_peft_saved(name, path, tmp_path):
    case = CASES[name]
    model = case.load(path(case.kind))
    state = random_state(model)
    model.write(state)
    model.module.save_pretrained(tmp_path / "a")
    again = case.load(path(case.kind), lora={"init": tmp_path / "a"})
    assert_equal(again.initial(0), state)


@pytest.fixture
def adapter(path, tmp_path):
    """A saved RoBERTa adapter."""
    model = CASES["roberta"].load(path("roberta"))
    model.save_adapter(random_state(model), tmp_path / "a", base_name="org/roberta")
    return tmp_path / "a"


def start(path, adapter, **lora):
    return CASES["roberta"].load(path("roberta"), lora={"init": adapter, **lora}).initial(0)


def test_another_scale_or_rank_is_refused_with_the_values_to_set(path, adapter):
    with pytest.raises(UserError, match="set in the recipe's lora: r: 3, lora_alpha: 5"):
        start(path, adapter, lora_alpha=6)
    with pytest.raises(UserError, match="set in the recipe's lora: r: 3, lora_alpha: 5"):
        start(path, adapter, r=4)
    with pytest.raises(UserError, match=r"target_modules: \['query', 'value'\]"):
        start(path, adapter, target_modules=["query", "key"])


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 1]]},
        {"a_field_of_the_future": 3},
        {"peft_type": "IA3"},
    ],
)
def test_an_adapter_with_other_fields_is_refused_by_name(path, adapter, field):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    with pytest.raises(UserError, match=next(iter(field))):
        start(path, adapter)


def test_an_adapter_that_changes_more_is_refused(path, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.other.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"other\.weight \(2,\), which is not trained here"):
        start(path, adapter)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no PEFT adapter"):
        start(path, adapter)
    with pytest.raises(UserError, match="is no PEFT adapter"):
        start(path, adapter / "nowhere")


def test_adapters_as_others_save_them(path, adapter, tmp_path):
    """Under the names of a state dict, in a subfolder, or with other ways to begin."""
    expected = start(path, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    named = {
        k.replace(".weight", ".default.weight") if ".lora_" in k else k: t
        for k, t in tensors.items()
    }
    save_file(named, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert_equal(start(path, adapter), expected)
    (tmp_path / "outer").mkdir()
    adapter.rename(tmp_path / "outer" / "hospital")
    assert_equal(start(path, tmp_path / "outer"), expected)


def test_an_empty_tensor_is_refused_with_its_cause(path, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "classifier" in k)
    save_file(tensors | {key: torch.empty(0)}, file)
    with pytest.raises(UserError, match=rf"{key} is empty, of size \(0,\).*ZeRO-3"):
        start(path, adapter)


def test_an_adapter_of_another_model_is_refused(path, adapter, tmp_path):
    wide = tiny("roberta", tmp_path / "wide", hidden_size=32)
    with pytest.raises(UserError, match=r"set model\.name to 'org/roberta'"):
        CASES["roberta"].load(wide, lora={"init": adapter}).initial(0)


def test_a_changed_base_embedding_is_refused(path, tmp_path):
    case = CASES["llama-embedding"]
    model = case.load(path("llama"))
    model.place(lambda name: Delta(torch.ones(model.layers[name].out, model.layers[name].inp)))
    model.module.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"changes the base weight of model\.embed_tokens"):
        case.load(path("llama"), lora={"init": tmp_path / "a"}).initial(0)


def test_a_fully_trained_model_has_no_adapter(path, tmp_path):
    spec = ModelSpec(name=str(path("bert")), device="cpu")
    model = load_model(spec, None, seed=0, **CASES["bert-embedding"].task)
    with pytest.raises(UserError, match="export it as a model"):
        model.save_adapter(model.read(), tmp_path, base_name="x")


def test_sharded_files_are_read_where_they_lie(path, tmp_path):
    model = plain(CASES["gpt2-lm"], path("gpt2"))
    model.save_pretrained(tmp_path / "s", max_shard_size="8KB")
    transformers.AutoTokenizer.from_pretrained(path("gpt2")).save_pretrained(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    assert_pretrained(CASES["gpt2-lm"], tmp_path / "s", tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama-embedding"])
def test_weights_that_are_in_no_safetensors_file_are_spilled(path, tmp_path, kind):
    case = CASES[kind]
    model = plain(case, path(case.kind))
    model.save_pretrained(tmp_path / "p")
    transformers.AutoTokenizer.from_pretrained(path(case.kind)).save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "p" / "pytorch_model.bin")
    assert_pretrained(case, tmp_path / "p", tmp_path / "work")
    assert [f.suffix for f in (tmp_path / "work").iterdir()] == [".safetensors"]
    assert_pretrained(case, tmp_path / "p", None)


def assert_pretrained(case, folder, workdir):
    spec = ModelSpec(name=str(folder), device="cpu")
    model = load_model(spec, LoraSpec(**case.lora), seed=0, workdir=workdir, **case.task)
    model.place(lambda name: Delta(torch.ones(model.layers[name].out, model.layers[name].inp)))
    expected = plain(case, folder)
    for name in model.layers:
        w = expected.get_submodule(name).weight
        found = model.pretrained(name)
        assert torch.equal(found if found.shape == w.shape else found.T, w)
