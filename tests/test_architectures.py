"""Shapes without weights: the published counts, and the same as of models that are loaded."""

import json
import socket

import pytest
import transformers
from tiny import tiny

from fedex_lora.errors import UserError
from fedex_lora.model.adapted import load_model
from fedex_lora.model.architectures import (
    architecture,
    count,
    natural_task,
    plain_model,
    read_config,
)
from fedex_lora.model.presets import PRESETS
from fedex_lora.recipe import LoraSpec, ModelSpec

# parameters of the published checkpoints; of RoBERTa with a head for two classes instead of MLM
SIZES = {
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "gpt2": 124_439_808,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2-9b": 9_241_705_984,
}
ADAPTERS = [  # model, layers, rank, parameters of LoRA
    ("roberta-base", ["query", "value"], 4, 147_456),
    ("roberta-base", None, 4, 147_456),
    ("roberta-large", ["query", "value"], 4, 393_216),
    ("gpt2", ["c_attn", "c_proj"], 4, 405_504),
    ("gpt2", None, 4, 147_456),
    ("mistral-7b-v0.1", ["q_proj", "v_proj"], 8, 3_407_872),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def shape(name, lora, labels=None):
    auto_model, task_type, kwargs = natural_task(read_config(name), labels)
    return architecture(
        name, lora, auto_model=auto_model, peft_task_type=task_type, model_kwargs=kwargs
    )


def test_presets_have_the_sizes_of_the_public_models():
    found = {name: shape(name, None).size for name in PRESETS}
    assert found == SIZES
    for name, preset in PRESETS.items():
        assert read_config(preset.ids[0]).to_dict() == read_config(name).to_dict()


@pytest.mark.parametrize("quantisation, of_linear", [(None, 4), ("int8", 1), ("nf4", 0.5625)])
def test_bytes_of_a_plain_model_by_hand(quantisation, of_linear):
    """GPT-2 has twelve layers of 768 × 2304, 768 × 768 and twice 768 × 3072; its output is tied."""
    linear = 12 * 768 * (2304 + 768 + 2 * 3072)
    spec = ModelSpec(name="gpt2", placement="side", quantisation=quantisation)
    found = plain_model("gpt2", read_config("gpt2"), "AutoModelForCausalLM")
    assert found.bytes(spec) == 4 * (SIZES["gpt2"] - linear) + int(of_linear * linear)


@pytest.mark.parametrize(("name", "targets", "rank", "parameters"), ADAPTERS)
def test_adapters_have_the_published_sizes(name, targets, rank, parameters):
    found = shape(name, LoraSpec(r=rank, target_modules=targets))
    assert found.trained - count(found.head.values()) == parameters


def test_c_proj_of_gpt2_is_adapted_in_the_attention_and_in_the_mlp():
    layers = shape("gpt2", LoraSpec(r=4, target_modules=["c_proj"])).layers
    assert {(s.out, s.inp) for s in layers.values()} == {(768, 768), (768, 3072)}
    assert len(layers) == 24


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "gemma2", "no pooler"])
def test_shapes_are_those_of_the_model_that_is_loaded(kind, tmp_path):
    path = tiny("bert" if kind == "no pooler" else kind, tmp_path / "model")
    if kind == "no pooler":  # what the files lack is trained with the head
        transformers.AutoModelForMaskedLM.from_pretrained(path).save_pretrained(path)
    lora = LoraSpec(r=3, lora_alpha=5, use_rslora=True)
    auto_model, task_type, kwargs = natural_task(read_config(str(path)))
    task = {"auto_model": auto_model, "peft_task_type": task_type, "model_kwargs": kwargs}
    loaded = load_model(ModelSpec(name=str(path)), lora, **task, seed=0)
    found = architecture(str(path), lora, **task)
    assert found.layers == loaded.layers
    head = loaded.initial(0).head
    assert {n: t.shape for n, t in head.items()} == dict(found.head)
    assert any("pooler" in n for n in head) == (kind == "no pooler")
    assert architecture(str(path), None, **task).size == found.size


def test_labels_make_a_classifier():
    head = shape("gpt2", LoraSpec(r=4), labels=5).head
    assert {n: tuple(s) for n, s in head.items()} == {"score.weight": (5, 768)}


@pytest.mark.parametrize(
    ("name", "near"),
    [("roberta-lage", "roberta-large"), ("google/gemma-2-9", "google/gemma-2-9b")],
)
def test_an_unknown_model_names_the_presets_and_the_nearest(name, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'.*llama-3.2-3b"):
        read_config(name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*config.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roburta"}))
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        read_config(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"matches no layer|not found"):
        shape("gpt2", LoraSpec(target_modules=["query"]))
