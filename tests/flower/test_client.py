"""`load_global` and `save_global` on tiny PEFT models: the dense global model, however often."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.flower import arrays as wire
from fedex_lora.flower import load_global, save_global

P = wire.PREFIX
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def base_model(kind: str, dtype: torch.dtype = torch.float32, hidden: int = 24, tied: bool = False):
    """Of random weights, the same each time. GPT-2's layers are in × out."""
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=40)
        config.update({"num_labels": 3, "pad_token_id": 0})
        auto = transformers.AutoModelForSequenceClassification
    else:
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=40,
        )  # fmt: skip
        auto = transformers.AutoModelForCausalLM
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return auto.from_config(config).to(dtype).eval()


TARGETS = {
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["score"]},
    "llama": {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "use_rslora": True},
}


def peft_model(kind: str, dtype: torch.dtype = torch.float32, **changes):
    task = "SEQ_CLS" if kind == "gpt2" else "CAUSAL_LM"
    config = LoraConfig(r=3, lora_alpha=5, task_type=task, **{**TARGETS[kind], **changes})
    return get_peft_model(base_model(kind, dtype), config).eval()


def drawn(model, seed: int, rank: int | None = 2):
    """Random arrays of the model's and a random T; `rank` None for dense."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=random)

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: normal(*tensor.shape) for name, tensor in state.items()}
    base = {}
    for layer, names in wire.layers_of(tensors).items():
        out, inp = tensors[names["B"]].shape[0], tensors[names["A"]].shape[1]
        left = normal(out, inp if rank is None else rank)
        base[layer] = Delta(left) if rank is None else Delta(left, normal(rank, inp))
    return tensors, base


def message(tensors, base) -> RecordDict:
    config = ConfigRecord({wire.TRAINS: "AB", wire.RESIDUAL: wire.packed(base)})
    return RecordDict({"arrays": ArrayRecord(tensors), "config": config})


def dense_logits(kind, tensors, base):
    """Of the plain model with W0 + T + s·B·A, worked out in float64, and the head."""
    model = base_model(kind)
    state = model.state_dict()
    scale = 5 / 3 if kind == "gpt2" else 5 / 3**0.5
    for layer, names in wire.layers_of(tensors).items():
        change = scale * tensors[names["B"]].double() @ tensors[names["A"]].double()
        if layer in base:
            change += base[layer].dense().double()
        w0 = state[f"{layer}.weight"].double()
        transposed = kind == "gpt2" or layer.endswith("embed_tokens")
        state[f"{layer}.weight"] = (w0 + (change.T if transposed else change)).float()
    if kind == "gpt2":
        state["score.weight"] = tensors[f"{P}score.weight"]
    else:
        state["lm_head.weight"] = base_model(kind).lm_head.weight  # of its own
    model.load_state_dict(state)
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("rank", [2, None])
def test_the_model_is_the_dense_global_model(kind, rank):
    model = peft_model(kind)
    tensors, base = drawn(model, 1, rank)
    load_global(model, message(tensors, base))
    expected = dense_logits(kind, tensors, base)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(peft_model(kind))).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_matters_neither_how_often_nor_what_came_before(kind, dtype):
    """Bits: a model of many rounds, one that loads twice, and one that has just been made."""
    model, fresh = peft_model(kind, dtype), peft_model(kind, dtype)
    pretrained = {n: t.clone() for n, t in model.state_dict().items() if "base_layer" in n}
    for seed in (1, 2, 3, 3):
        load_global(model, message(*drawn(model, seed)))
    load_global(fresh, message(*drawn(fresh, 3)))
    for (name, t), other in zip(model.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(t, other), name
    name = "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"
    if kind == "gpt2":  # one rounding of W0 + T
        t = drawn(fresh, 3)[1]["transformer.h.0.attn.c_attn"].dense().T
        w0 = base_model(kind, dtype).transformer.h[0].attn.c_attn.weight
        assert torch.equal(model.state_dict()[name], (w0.float() + t).to(dtype))
    load_global(model, message(drawn(model, 4)[0], {}))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in pretrained.items())


def test_a_copy_of_the_model_knows_what_was_placed():
    model = peft_model("gpt2")
    load_global(model, message(*drawn(model, 1)))
    twin = copy.deepcopy(model)
    for one in (twin, model):
        load_global(one, message(*drawn(one, 2)))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))


def test_beside_quantised_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = base_model("llama", hidden=64)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = bitsandbytes.nn.Linear4bit(64, old.out_features, bias=False, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data, quant_type="nf4")
            setattr(layer.self_attn, name, new.to("cpu"))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config).eval()
    tensors, base = drawn(model, 1)
    zero = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in tensors.items()}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    seen = {}
    for what in ("before", "after"):  # the difference that T makes to the layer's own output
        with torch.no_grad():
            seen[what] = layer(x)
        for _ in range(2):
            load_global(model, message(zero, base))
    t = base["model.layers.0.self_attn.q_proj"].dense()
    # on a CPU the layer answers in bfloat16
    torch.testing.assert_close(seen["after"] - seen["before"], x @ t.T, atol=5e-3, rtol=1e-2)


def test_a_tied_embedding_gains_t_and_the_head_does_not():
    model = get_peft_model(
        base_model("llama", tied=True),
        LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **TARGETS["llama"]),
    ).eval()
    tensors, base = drawn(model, 1)
    for _ in range(2):
        load_global(model, message(tensors, base))
    plain, old = base_model("llama"), base_model("llama", tied=True)
    state, scale = old.state_dict(), 5 / 3**0.5
    for layer, names in wire.layers_of(tensors).items():
        change = base[layer].dense() + scale * tensors[names["B"]] @ tensors[names["A"]]
        change = change.T if layer.endswith("embed_tokens") else change
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + change
    plain.load_state_dict(state)
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_name_is_named():
    model = peft_model("gpt2")
    content = message(*drawn(model, 1))
    model.add_adapter("second", LoraConfig(r=3, task_type="SEQ_CLS", **TARGETS["gpt2"]))
    with pytest.raises(UserError, match="has adapters default, second; expected one, 'default'"):
        load_global(model, content)


def test_what_is_written_is_the_global_model_for_peft_alone(tmp_path):
    model = peft_model("gpt2")
    tensors, base = drawn(model, 1)
    # as `evaluate_fn` gets it: T among the arrays
    whole = ArrayRecord({**tensors, **wire.named(base)})
    load_global(model, whole)
    save_global(model, whole, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(base_model("gpt2"), tmp_path / "adapter").eval()
    expected = dense_logits("gpt2", tensors, base)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_ffa_freezes_a():
    model = peft_model("gpt2")
    tensors, _ = drawn(model, 1)
    config = ConfigRecord({wire.TRAINS: "B", wire.RESIDUAL: b""})
    load_global(model, RecordDict({"arrays": ArrayRecord(tensors), "config": config}))
    trains = {name.split(".lora_")[1][0] for name, p in model.named_parameters()
              if p.requires_grad and ".lora_" in name}  # fmt: skip
    assert trains == {"B"}


def broken(change):
    model = peft_model("gpt2")
    tensors, base = drawn(model, 1)
    content = message(tensors, base)
    change(tensors, base, content["config"])
    content["arrays"] = ArrayRecord(tensors)
    content["config"][wire.RESIDUAL] = content["config"][wire.RESIDUAL] and wire.packed(base)
    return model, content


Q = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t, base, c: t.update({f"{P}{Q}.lora_A.weight": torch.ones(4, 24)}),
            r"shape \(4, 24\); this model expects \(3, 24\)",
        ),
        (
            lambda t, base, c: [t.pop(f"{P}{Q}.lora_{x}.weight") for x in "AB"],
            f"{Q}: a LoRA layer that this model alone has",
        ),
        (
            lambda t, base, c: t.update({f"{P}x.weight": torch.ones(1)}),
            "model has none of that name",
        ),
        (lambda t, base, c: base.update({Q: Delta(torch.ones(3, 3))}), "a residual of shape"),
        (lambda t, base, c: c.update({wire.SCALES: [2.0] * 6}), "scale is 1.66667 here and 2 at"),
    ],
)
def test_arrays_of_another_model_are_named(change, told):
    model, content = broken(change)
    before = {n: p.clone() for n, p in model.named_parameters() if ".base_layer." in n}
    with pytest.raises(UserError, match=told):
        load_global(model, content)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())


def test_a_residual_that_is_no_safetensors_file_is_named():
    model = peft_model("gpt2")
    content = message(*drawn(model, 1))
    content["config"][wire.RESIDUAL] = b"12345678xxxx"
    with pytest.raises(UserError, match="residual cannot be read"):
        load_global(model, content)


def test_a_plain_model_has_no_adapter():
    model = peft_model("gpt2")
    with pytest.raises(UserError, match=r"expected one from peft\.get_peft_model"):
        load_global(base_model("gpt2"), message(*drawn(model, 1)))
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge it first"):
        load_global(model, message(*drawn(model, 1)))
