"""Updates added to a full model, against the plain model with W + ΔW set by hand."""

import json
import os
import shutil

import pytest
import torch
import transformers
from merging import (
    CASES,
    CLS,
    LM,
    WEIGHTS,
    Case,
    base,
    command,
    logits,
    oracle,
    plain,
    save,
    saved,
    update,
)
from safetensors.torch import load_file, save_file
from tiny import tiny

__all__ = ["base", "command"]
TIED = {  # GPT-2's head is its embedding
    "tied-embedding": Case("gpt2", LM[0], [{"r": r, "target_modules": ["wte"]} for r in (2, 3)]),
    "tied-head": Case(
        "gpt2",
        LM[0],
        [{"r": r, "target_modules": ["c_attn"], "modules_to_save": ["lm_head"]} for r in (2, 3)],
    ),
}


def folders(adapters):
    return [a.folder for a in adapters]


@pytest.mark.parametrize("name", [*CASES, *TIED])
def test_the_merged_model_says_what_the_dense_sum_says(name, base, command, tmp_path):
    case = (CASES | TIED)[name]
    path = base(case.kind)
    adapters = saved(case, path, tmp_path)
    weights = WEIGHTS[: len(adapters)]
    given = ",".join(map(str, weights))
    code, out, err = command(
        *folders(adapters), "--weights", given, "--into-base", path, "--out", tmp_path / "out"
    )
    assert code == 0, err
    loaded = getattr(transformers, case.auto).from_pretrained(tmp_path / "out")
    # without a task type, the class that PEFT noted
    assert ("GPT2LMHeadModel" if name in TIED else case.auto) in out
    assert loaded.dtype == torch.float32
    expected = logits(oracle(path, case, adapters, weights), path)
    assert (logits(loaded, path) - expected).norm() <= 2e-6 * expected.norm()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert ("shared one weight" in out) == (name in TIED)
    untouched = name in ("llama", "gpt2", "llama-embeddings")
    same = (path / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    assert same == untouched


def test_shards_keep_their_places_and_the_sum_is_rounded_once(command, tmp_path):
    path = tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    model = plain(path, LM[0])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    shutil.copy(path / "tokenizer.json", tmp_path / "sharded")
    adapters = [save(path, LM[0], tmp_path / f"a{i}", i, **c) for i, c in enumerate(configs())]
    out = tmp_path / "out"
    code, said, err = command(*folders(adapters), "--into-base", tmp_path / "sharded", "--out", out)
    assert code == 0, err
    before, after = (
        json.loads((p / "model.safetensors.index.json").read_text())
        for p in (tmp_path / "sharded", out)
    )
    assert len(set(after["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    got = {k: t for f in out.glob("*.safetensors") for k, t in load_file(f).items()}
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    old = plain(path, LM[0]).state_dict()
    lost = size = 0.0
    for key, tensor in got.items():
        site = key.removesuffix(".weight")
        if site not in adapters[0].factors:
            assert torch.equal(tensor, old[key])
            continue
        exact = old[key].double()
        for adapter in adapters:
            a, b, s = adapter.factors[site]
            exact += 0.5 * s * b.double() @ a.double()
        nearest = exact.bfloat16()  # one rounding; where float32 falls on the other side, the next
        assert tensor.dtype == torch.bfloat16 and (tensor == nearest).float().mean() > 0.99
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-8, atol=1e-7)
        lost, size = lost + (tensor - exact).norm() ** 2, size + exact.norm() ** 2
    said_rounding = float(said.split("dtype: ")[1].split()[0])
    assert said_rounding == pytest.approx(((lost / size) ** 0.5).item(), rel=1e-2)


def configs():
    return CASES["llama"].configs[1:]


def test_another_dtype_and_a_rank(base, command, tmp_path):
    path = base("llama")
    adapters = [save(path, LM[0], tmp_path / f"a{i}", i, **c) for i, c in enumerate(configs())]
    options = ["--into-base", path, "--dtype", "bfloat16", "--rank", 1]
    code, said, err = command(*folders(adapters), *options, "--out", tmp_path / "out")
    assert code == 0 and "Cut off: 0." in said, err
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    site = next(iter(adapters[0].factors))
    parts = [a.factors[site] for a in adapters]
    u, s, vh = torch.linalg.svd(sum(0.5 * s * b.double() @ a.double() for a, b, s in parts))
    exact = plain(path, LM[0]).get_parameter(f"{site}.weight") + s[0] * u[:, :1] @ vh[:1]
    got = loaded.get_parameter(f"{site}.weight")
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.fixture
def one(base, tmp_path):
    return save(base("llama"), LM[0], tmp_path / "a0", 0, **CASES["llama"].configs[1]).folder


def refused(command, tmp_path, one, model, text):
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, _, err = command(one, "--into-base", model, "--out", tmp_path / "out")
    assert code == 2 and text in " ".join(err.split()), err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_models_that_do_not_fit_are_refused(base, one, command, tmp_path):
    refused(command, tmp_path, one, base("gpt2"), "has no layer model.layers.0.mlp.down_proj")
    wider = tiny("llama", tmp_path / "wider", intermediate_size=32)
    refused(command, tmp_path, one, wider, "is 16 × 32 in")
    refused(command, tmp_path, one, tmp_path / "absent", "there is no")
    (tmp_path / "empty").mkdir()
    refused(command, tmp_path, one, tmp_path / "empty", "there is no")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(command, tmp_path, one, tmp_path / "empty", "no model that transformers knows")


def test_damaged_or_quantised_models_are_refused(base, one, command, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base("llama"), model)
    config = json.loads((model / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (model / "config.json").write_text(json.dumps(quantised))
    refused(command, tmp_path, one, model, "is quantised by gptq, which is not undone here")
    (model / "config.json").write_text(json.dumps(config))
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    refused(command, tmp_path, one, model, "truncated or damaged")
    file.rename(model / "pytorch_model.bin")
    refused(command, tmp_path, one, model, "expected a model saved as safetensors")
    index = {"weight_map": {"x": "../../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, tmp_path, one, model, "expected a file beside")
    index = {"weight_map": {"x": "shard-1.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, tmp_path, one, model, "missing, truncated or damaged")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"eos_token_id": "x"}, "no model that transformers knows: Validation error"),
        ({"dtype": []}, "no model that transformers knows"),
        ({"num_attention_heads": 0}, "no model that transformers knows"),
        ({"pad_token_id": 10**9}, "no model that transformers knows: Padding_idx"),
        ({"architectures": 1.5}, ""),
        ({"architectures": ["os"]}, ""),
    ],
)
def test_configs_that_are_none(base, one, command, tmp_path, fields, text):
    model = tmp_path / "model"
    shutil.copytree(base("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    if text:
        refused(command, tmp_path, one, model, text)
    else:  # the task type names the class
        assert command(one, "--into-base", model, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.flatten(), "is (256,) in the files of"),
        (lambda t: t.to(torch.int8), "has dtype torch.int8, to which no update can be added"),
        (lambda t: t.to(torch.complex64), "has dtype C64"),
        (None, "hold no tensor for model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_weights_that_are_none(base, one, command, tmp_path, change, text):
    model = tmp_path / "model"
    shutil.copytree(base("llama"), model)
    file, key = model / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(file)
    weight = tensors.pop(key)
    save_file(tensors | ({key: change(weight)} if change else {}), file)
    refused(command, tmp_path, one, model, text)


@pytest.mark.parametrize("state", [b"nonsense", b"[1]", b"{}", b'{"dtype":"x","shape":[1]}'])
def test_a_damaged_state_of_a_quantised_weight(base, one, command, tmp_path, state):
    model = tmp_path / "model"
    shutil.copytree(base("llama"), model)
    file = model / "model.safetensors"
    key = "model.norm.weight.quant_state.bitsandbytes__nf4"
    save_file(load_file(file) | {key: torch.tensor(list(state), dtype=torch.uint8)}, file)
    refused(command, tmp_path, one, model, f"{key} is no state of a quantised weight")


def test_a_head_for_other_labels_sets_them_and_another_size_is_refused(base, command, tmp_path):
    config = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"]}
    adapter = save(base("bert"), CLS[0], tmp_path / "a0", 0, **config)
    code, _, err = command(adapter.folder, "--into-base", base("bert"), "--out", tmp_path / "out")
    assert code == 0, err
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert loaded.config.num_labels == 3 and not info["missing_keys"]
    assert torch.equal(loaded.classifier.weight, adapter.head["classifier.weight"])
    other = tiny("bert", tmp_path / "wide", hidden_size=20)
    refused(
        command, tmp_path, adapter.folder, other, "expected the model that they were trained on"
    )


def test_a_base_in_an_installed_package(command, tmp_path, monkeypatch):
    package = tmp_path / "site" / "of_models"
    path = tiny("llama", package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapter = save(path, "AutoModelForCausalLM", tmp_path / "a", 1, **config)
    name, out = "package:of_models/model", tmp_path / "out"
    code, _, told = command(adapter.folder, "--into-base", name, "--out", out)
    assert code == 0, told
    expected = load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = expected + update([adapter], [1.0], "model.layers.0.self_attn.q_proj")
    got = load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(got.double(), expected, atol=1e-6)
