"""Loading: what is found where, and what is refused."""

import logging
import random

import huggingface_hub
import pytest
import torch
import transformers
from adapted import CASES, CLASSIFY, GENERATE, Case, batch, logits, path
from tiny import tiny
from torch import nn

from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.model.adapted import load_model
from fedex_lora.model.inject import inject
from fedex_lora.model.load import Base, quiet
from fedex_lora.recipe import LoraSpec, ModelSpec

__all__ = ["path"]


def load(name, **lora):
    spec = LoraSpec(**{"target_modules": ["query"], **lora})
    return load_model(ModelSpec(name=str(name), device="cpu"), spec, seed=0, **CLASSIFY)


def test_a_model_in_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_model_package"
    tiny("bert", package / "model")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("package:some_model_package/model").layers
    with pytest.raises(UserError, match=r"there is no .*some_model_package/other/config\.json"):
        load("package:some_model_package/other")
    with pytest.raises(UserError, match="no Python package 'no_such_package'"):
        load("package:no_such_package/model")


def test_a_path_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no model: there is no .*config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="is no model"):
        load("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as AutoModelForSequenceClassification"):
        load(tmp_path)


def test_damaged_or_missing_weights_are_refused(tmp_path):
    folder = tiny("bert", tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)


def test_what_stands_for_a_file_is_called_what_it_is(tmp_path):
    folder = tiny("bert", tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a pointer of Git LFS"):
        load(folder)
    weights.unlink()
    weights.symlink_to("../../blobs/4d")
    with pytest.raises(
        UserError, match=r"model\.safetensors is a link to .*4d, which is not there"
    ):
        load(folder)


def test_an_unknown_hub_name_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'no-such/model' cannot be loaded .* a hub id"):
        load("no-such/model")


def test_an_unusable_device_is_refused(path):
    spec = ModelSpec(name=str(path("bert")), device="abacus")
    with pytest.raises(UserError, match=r"model\.device: 'abacus' cannot be used"):
        load_model(spec, LoraSpec(), seed=0, **CLASSIFY)


def test_weights_of_another_architecture_are_refused(path, tmp_path):
    folder = tiny("bert", tmp_path / "m")
    (folder / "model.safetensors").write_bytes((path("gpt2") / "model.safetensors").read_bytes())
    with pytest.raises(
        UserError, match=r"most of the weights of a BertForSequenceClassification are not in"
    ):
        load(folder)


def test_targets_that_match_nothing_are_refused_with_what_there_is(path):
    kinds = "c_attn, c_fc, c_proj, score, wpe, wte"
    with pytest.raises(UserError, match=kinds):
        load(path("gpt2"), target_modules=["query"])
    with pytest.raises(UserError, match=f"'c_atn' matches nothing; the model has: {kinds}"):
        load(path("gpt2"), target_modules=["c_fc", "c_atn"])
    with pytest.raises(UserError, match=r"target_modules: 'score' is trained in full"):
        load(path("gpt2"), target_modules=["c_fc", "score"])
    with pytest.raises(UserError, match=r"modules_to_save: 'klassifier' matches nothing"):
        load(path("bert"), modules_to_save=["klassifier"])
    with pytest.raises(UserError, match=r"exclude_modules: 'qury' matches nothing"):
        load(path("bert"), exclude_modules=["qury"])
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError, match=rf"{field}: 'qury' .* adapted layers: query$"):
            load(path("bert"), **{field: {"query": 2, "qury": 4}})
    blocks = r"'word_embeddings' matches nothing in the blocks of lora\.layers_to_transform"
    with pytest.raises(UserError, match=blocks):
        load(path("bert"), target_modules=["query", "word_embeddings"], layers_to_transform=[1])
    with pytest.raises(UserError, match="layers_to_transform"):
        load(path("bert"), layers_pattern="layer")


def test_tied_weights_are_refused(path):
    embedding = Case("gpt2", {"target_modules": ["wte"]}, GENERATE)
    with pytest.raises(UserError, match=r"transformer\.wte is shared .* leave it out"):
        embedding.load(path("gpt2"))
    head = Case("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}, GENERATE)
    with pytest.raises(UserError, match="lm_head shares its weight"):
        head.load(path("gpt2"))
    assert Case("gpt2", {"target_modules": ["wte"]}, CLASSIFY).load(path("gpt2")).layers


class Odd(transformers.PreTrainedModel):
    """Layers for which aggregation would not be exact, or that are no plain matrix."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(2, 3, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.rescaled = nn.Embedding(5, 4, max_norm=1.0)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("conv", "conv is a Conv2d"),
        ("attention", "attention is a MultiheadAttention"),
        ("rescaled", "max_norm"),
        ("computed", "computes its weight"),
    ],
)
def test_layers_that_cannot_be_aggregated_exactly_are_refused_by_name(name, why):
    base = Base(Odd(transformers.BertConfig()), None, "", frozenset(), False)
    with pytest.raises(UserError, match=why):
        inject(base, LoraSpec(target_modules=[name]), "FEATURE_EXTRACTION", 0)


def test_loading_is_silent_and_leaves_every_generator_alone(path, capfd):
    torch.manual_seed(1)
    state = torch.random.get_rng_state(), random.getstate()
    load(path("bert"))
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_a_tokenizer_without_any_end_is_refused(tmp_path):
    folder = tiny("llama", tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        CASES["llama"].load(folder)


def test_a_model_in_the_hubs_cache_is_found_and_its_files_are_read(tmp_path, monkeypatch):
    repo = tmp_path / "models--some--bert"
    tiny("bert", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_model(
        ModelSpec(name="some/bert", device="cpu"),
        LoraSpec(target_modules=["query"]),
        seed=0,
        workdir=tmp_path / "work",
        **CLASSIFY,
    )
    assert model.layers
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_quantised_bases_take_increments_beside_them(quantisation, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    folder = tiny("llama", tmp_path / "m", hidden_size=64, intermediate_size=96, head_dim=16)
    model = CASES["llama"].load(folder, placement="side", quantisation=quantisation)
    state = model.initial(0)
    model.write(state)
    inputs = batch(model)
    start = logits(model.module, inputs)
    w0 = {name: model.pretrained(name) for name in model.layers}
    g = torch.Generator().manual_seed(0)
    added = {
        n: Delta(0.3 * torch.randn(s.out, s.inp, generator=g)) for n, s in model.layers.items()
    }
    model.place(added.get)
    changed = logits(model.module, inputs)
    # int8 rounds what goes in as well
    tolerance = 1e-5 if quantisation == "nf4" else 0.02
    for increment, seen in ((added.get, changed), (lambda name: None, start)):
        expected = logits(model.merged(state, increment, torch.float32), inputs)
        assert (seen - expected).norm() < tolerance * expected.norm()
    assert (changed - start).norm() > 0.05 * start.norm()
    assert all(torch.equal(model.pretrained(n), w) for n, w in w0.items())
    model.freeze(frozenset("AB"))
    model.module.train()
    model.module(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.module.parameters() if p.requires_grad)


def test_quantisation_needs_its_library(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedex-lora\[quantised\]'"):
        CASES["llama"].load(path("llama"), placement="side", quantisation="nf4")


def test_a_head_that_the_checkpoint_lacks_and_that_is_tied_is_named(tmp_path):
    """As of a sentence encoder, which was saved without its masked language model's head."""
    spec = LoraSpec(target_modules=["query"])
    name = str(tiny("bert", tmp_path / "bert"))
    with pytest.raises(UserError, match=r"model\.name: the checkpoint has no cls.*saved with it"):
        load_model(
            ModelSpec(name=name, device="cpu"),
            spec,
            seed=0,
            auto_model="AutoModelForMaskedLM",
            peft_task_type=None,
            model_kwargs={},
        )


def test_what_the_hub_s_library_warns_of_is_said_once(caplog, monkeypatch):
    hub, said = logging.getLogger("huggingface_hub"), []
    own = logging.Handler()
    own.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(hub, "handlers", [own])  # as its library adds one when it is imported
    with quiet():
        hub.getChild("utils").warning("Retrying")
    assert caplog.messages == ["Retrying"] and not said
    hub.getChild("utils").warning("again")
    assert said == ["again"]
