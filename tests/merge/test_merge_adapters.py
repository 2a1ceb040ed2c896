# pyright: reportAttributeAccessIssue=false
"""Merged adapters as PEFT loads them, against dense float64 sums and PEFT's own merges."""

import json
from itertools import pairwise

import peft
import pytest
import torch
from merging import CASES, LM, WEIGHTS, base, logits, oracle, plain, save, saved, update
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import Options, merge_adapters

__all__ = ["base"]


def merge(adapters, out, weights=None, strict=True, **options):
    plan = make_plan([open_adapter(str(a.folder)) for a in adapters], weights, strict)
    return merge_adapters(plan, out, Options(**options))


@pytest.mark.parametrize("name", CASES)
def test_the_merged_adapter_says_what_the_dense_sum_says(name, base, tmp_path):
    case = CASES[name]
    path = base(case.kind)
    adapters = saved(case, path, tmp_path)
    weights = WEIGHTS[: len(adapters)]
    done = merge(adapters, tmp_path / "out", weights)
    loaded = peft.PeftModel.from_pretrained(plain(path, case.auto), tmp_path / "out")
    got, expected = logits(loaded, path), logits(oracle(path, case, adapters, weights), path)
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    assert done.layers.keys() == adapters[0].factors.keys()
    for site, layer in done.layers.items():
        exact = update(adapters, weights, site)
        assert layer.rank == torch.linalg.matrix_rank(exact, rtol=1e-6)
        assert layer.norm == pytest.approx(exact.norm().item(), rel=1e-6)
        assert layer.missed == layer.rounding == 0 and layer.averaging is None
    scales = [m.scaling["default"] for m in loaded.modules() if isinstance(m, LoraLayer)]
    assert set(scales) == {1.0}


def test_a_rank_and_an_error_are_reported_as_they_are(base, tmp_path):
    adapters = saved(CASES["llama"], base("llama"), tmp_path)
    for name, options in (("two", {"rank": 2}), ("auto", {"error": 0.3})):
        done = merge(adapters, tmp_path / name, WEIGHTS, **options)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        missed = size = 0.0
        for site, layer in done.layers.items():
            a, b = (stored[f"base_model.model.{site}.lora_{x}.weight"].double() for x in "AB")
            exact = update(adapters, WEIGHTS, site)
            values = torch.linalg.svdvals(exact)
            padding = (a[layer.rank :], b[:, layer.rank :])
            assert a.shape[0] == most(done) and not any(zeros.any() for zeros in padding)
            lost = (exact - b @ a).norm().item()
            assert lost == pytest.approx(values[layer.rank :].norm().item(), rel=1e-5)
            assert layer.missed == pytest.approx(lost, rel=1e-5)
            if name == "two":
                assert layer.rank == 2
            else:
                assert lost <= 0.3 * values.norm() < values[layer.rank - 1 :].norm()
            missed, size = missed + lost**2, size + exact.norm().item() ** 2
        assert done.relative(lambda layer: layer.missed) == pytest.approx((missed / size) ** 0.5)
        ranks = {site: layer["rank"] for site, layer in report(tmp_path / name).items()}
        assert ranks == {site: layer.rank for site, layer in done.layers.items()}
        loaded = peft.PeftModel.from_pretrained(plain(base("llama"), LM[0]), tmp_path / name)
        for site in done.layers:
            module = loaded.base_model.model.get_submodule(site)
            assert module.r["default"] == most(done)


def most(done):
    return max(layer.rank for layer in done.layers.values())


def report(out):
    return json.loads((out / "merge.json").read_text())["layers"]


def test_plain_averaging_is_as_far_off_as_it_says(base, tmp_path):
    adapters = saved(CASES["gpt2"], base("gpt2"), tmp_path)
    done = merge(adapters, tmp_path / "out", [3, 1], compare=True)
    for site, layer in done.layers.items():
        parts = [(*a.factors[site], w) for a, w in zip(adapters, (0.75, 0.25))]
        mean_a = torch.zeros(3, parts[0][0].shape[1], dtype=torch.float64)
        mean_b = torch.zeros(parts[0][1].shape[0], 3, dtype=torch.float64)
        for a, b, s, w in parts:
            mean_a[: a.shape[0]] += w * a
            mean_b[:, : b.shape[1]] += w * s * b
        off = update(adapters, [3, 1], site) - mean_b @ mean_a
        assert layer.averaging == pytest.approx(off.norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-embeddings"])
def test_the_same_as_peft(name, base, tmp_path):
    case = CASES[name]
    path = base(case.kind)
    adapters = saved(case, path, tmp_path)
    weights = [w / sum(WEIGHTS[: len(adapters)]) for w in WEIGHTS[: len(adapters)]]
    model = peft.PeftModel.from_pretrained(plain(path, case.auto), adapters[0].folder, "a0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter.folder, f"a{i}")
    names = [f"a{i}" for i in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "cat", combination_type="cat")
    model.add_weighted_adapter(
        names, weights, "svd", combination_type="svd", svd_rank=2, svd_full_matrices=False
    )
    merge(adapters, tmp_path / "whole", weights)
    merge(adapters, tmp_path / "two", weights, rank=2)
    model.load_adapter(tmp_path / "whole", "whole")
    model.load_adapter(tmp_path / "two", "two")
    for site in adapters[0].factors:
        module = model.base_model.model.get_submodule(site)
        cat, svd, whole, two = (
            module.get_delta_weight(n).double() for n in ("cat", "svd", "whole", "two")
        )
        exact = update(adapters, weights, site)
        exact = exact if exact.shape == cat.shape and torch.allclose(exact, cat, 1e-3) else exact.T
        assert (whole - cat).norm() <= 1e-6 * cat.norm()
        ours, theirs = (exact - two).norm(), (exact - svd).norm()
        assert abs(ours - theirs) <= 1e-6 * exact.norm()
        values = torch.linalg.svdvals(exact)
        if values[1] - values[2] > 0.01 * values[0]:
            # PEFT's SVD in float32 has an error of its own
            assert (two - svd).norm() <= 1e-6 * exact.norm() * values[0] / (values[1] - values[2])


def test_nearby_heads_and_dtypes(base, tmp_path):
    """Heads keep their dtype and digits; equal ones stay equal bit for bit."""
    config = CASES["bert"].configs[0]
    one = save(base("bert"), CASES["bert"].auto, tmp_path / "a0", 0, **config)
    two = save(base("bert"), CASES["bert"].auto, tmp_path / "a1", 1, **config)
    for adapter in (one, two):
        file = adapter.folder / "adapter_model.safetensors"
        tensors = {k: t.bfloat16() if "classifier" in k else t for k, t in load_file(file).items()}
        tensors["base_model.model.classifier.bias"] = torch.tensor([1 / 3, 0.1, 0.7]).bfloat16()
        save_file(tensors, file)
    merge([one, two], tmp_path / "out", [1, 2], dtype=torch.bfloat16)
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    first, second = (load_file(x.folder / "adapter_model.safetensors") for x in (one, two))
    key = "base_model.model.classifier.weight"
    mean = (first[key].double() + 2 * second[key].double()) / 3
    assert torch.equal(got[key], mean.bfloat16())
    assert torch.equal(got["base_model.model.classifier.bias"], first[f"{key[:-6]}bias"])
    layers = report(tmp_path / "out").values()
    assert all(1e-4 < layer["rounding"] / layer["norm"] < 1e-2 for layer in layers)
    assert {t.dtype for k, t in got.items() if ".lora_" in k} == {torch.bfloat16}


def test_embeddings_that_peft_saved_beside_the_adapter_are_kept_or_refused(base, tmp_path):
    adapters = saved(CASES["llama-embeddings"], base("llama"), tmp_path)
    file = adapters[1].folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("embed_tokens.base_layer.weight"))
    merge(adapters, tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert torch.equal(kept[key], tensors[key])
    save_file(tensors | {key: tensors[key] + 1}, file)
    with pytest.raises(ValueError, match=r"differ in .*embed_tokens.*different base models"):
        merge(adapters, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "kept"]


def test_without_strict_what_all_share_is_merged_and_the_rest_is_listed(base, tmp_path):
    case, path = CASES["bert"], base("bert")
    narrow = case.configs[0] | {"target_modules": ["query", "word_embeddings"]}
    one = save(path, case.auto, tmp_path / "a0", 0, **narrow)
    wide = case.configs[0] | {"target_modules": ["query", "value"], "task_type": None}
    two = save(path, case.auto, tmp_path / "a1", 1, **wide)
    with pytest.raises(
        ValueError, match=r"(?s)do not go together.*task_type.*value.*`strict=False`"
    ):
        merge([one, two], tmp_path / "out")
    done = merge([one, two], tmp_path / "out", strict=False)
    assert all(site.endswith("query") for site in done.layers) and len(done.layers) == 2
    said = " ".join(done.left_out)
    assert "word_embeddings" in said and "value" in said and "classifier" in said
    loaded = peft.PeftModel.from_pretrained(plain(path, case.auto), tmp_path / "out")
    for site in done.layers:
        delta = loaded.base_model.model.get_submodule(site).get_delta_weight("default")
        exact = update([one, two], [1, 1], site)
        assert (delta.double() - exact).norm() <= 1e-6 * exact.norm()


def test_a_layer_that_cancels_is_kept_as_zeros(base, tmp_path):
    one = save(base("llama"), LM[0], tmp_path / "a0", 0, **CASES["llama"].configs[2])
    (tmp_path / "a1").mkdir()
    config = (one.folder / "adapter_config.json").read_text()
    (tmp_path / "a1" / "adapter_config.json").write_text(config)
    tensors = load_file(one.folder / "adapter_model.safetensors")
    minus = {k: -t if "lora_B" in k else t for k, t in tensors.items()}
    save_file(minus, tmp_path / "a1" / "adapter_model.safetensors")
    plan = make_plan([open_adapter(str(tmp_path / a)) for a in ("a0", "a1")], None, True)
    done = merge_adapters(plan, tmp_path / "out")
    assert {layer.rank for layer in done.layers.values()} == {0}
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(not t.any() and 1 in t.shape for t in got.values())
    peft.PeftModel.from_pretrained(plain(base("llama"), LM[0]), tmp_path / "out")


def test_the_file_is_what_the_format_says(base, tmp_path):
    adapters = saved(CASES["llama"], base("llama"), tmp_path)
    merge(adapters, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(content) - 8 - size
    assert all(left[1] == right[0] for left, right in pairwise(ends))
    with safe_open(file, framework="pt") as f:
        assert set(f.keys()) == set(header)
