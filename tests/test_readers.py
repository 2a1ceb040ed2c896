"""Adapters as programs read them that do not know all of PEFT's settings.

Their rules, written down from what they document: vLLM scales every layer by the config's
`lora_alpha / r` and knows no patterns; llama.cpp scales a layer by `lora_alpha` over the rank of
its tensor. PEFT itself is the third reader.
"""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_runs import products, recipe
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import Options, merge_adapters
from fedex_lora.model import config as config_module
from fedex_lora.runs import export as export_module
from fedex_lora.runs.export import export_adapter
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run

IDS = torch.arange(3, 19).reshape(2, 8)
# layers whose ranks differ: of unequal sides, so that full ranks are unequal too
TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["word_embeddings", "query"],
}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
}
RULES = {
    "vLLM": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
}


def plain(kind, base):
    model = getattr(transformers, AUTO[kind]).from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 1
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read_by(rule, kind, base, folder):
    """The base with W + scale · B·A, the scale by a reader's rule; heads in place of the base's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = plain(kind, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        site = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", name)
        if site != name:
            b = tensors[key.replace("_A", "_B")]
            layer = model.get_submodule(site)
            delta = RULES[rule](config, tensor.shape[0]) * b.double() @ tensor.double()
            turned = isinstance(layer, Conv1D | nn.Embedding)
            layer.weight.data += (delta.T if turned else delta).float()
        elif ".lora_" not in name and ".base_layer." not in name:
            model.get_parameter(name).data = tensor
    return logits(model)


def read_by_peft(kind, base, folder):
    return logits(peft.PeftModel.from_pretrained(plain(kind, base), folder))


def assert_read_alike(kind, base, folder, expected, tolerance=1e-4):
    got = {"PEFT": read_by_peft(kind, base, folder)}
    got |= {rule: read_by(rule, kind, base, folder) for rule in RULES}
    for found in got.values():
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a kind of model to a run of two rounds on it, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            rslora = kind == "llama"
            lora = {"r": 2, "lora_alpha": 7, "use_rslora": rslora, "target_modules": TARGETS[kind]}
            start_run(recipe(folder, kind, lora=lora), folder / "run")
            made[kind] = folder
        return made[kind]

    return get


@pytest.mark.parametrize("kind", TARGETS)
def test_three_readers_see_a_run_s_model(kind, runs, tmp_path):
    folder = runs(kind)
    trained = open_run(folder / "run")
    whole = products(folder / "run" / "final" / "adapter")
    base = folder / kind
    trained.show()
    expected = logits(trained.model.module)
    assert (expected - logits(plain(kind, base))).norm() > 1e-2 * expected.norm()
    assert_read_alike(kind, base, folder / "run" / "final" / "adapter", expected)
    # and so they do at a rank, for which the change is cut by hand
    for options in ({"rank": 2}, {"error": 0.2}):
        done = export_adapter(trained, tmp_path / next(iter(options)), **options)
        stored = products(done.path)
        for site, matrix in whole.items():
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            tails = [s[r:].norm() for r in range(len(s) + 1)]
            rank = (
                2
                if "rank" in options
                else next(r for r, tail in enumerate(tails) if tail <= 0.2 * tails[0])
            )
            cut = u[:, :rank] * s[:rank] @ vh[:rank]
            assert (stored[site] - cut).norm() < 1e-4 * matrix.norm()
        assert_read_alike(kind, base, done.path, read_by_peft(kind, base, done.path))


@pytest.mark.parametrize("rank", [None, 1])
def test_three_readers_see_a_merged_adapter(rank, runs, tmp_path):
    """Of adapters with patterns and rsLoRA, whose layers have other ranks each."""
    base, folders = runs("llama") / "llama", []
    for i, more in enumerate(
        [
            {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"layers.1.mlp.down_proj": 7}},
            {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        ]
    ):
        lora = {"r": 2 + i, "lora_alpha": 5, "target_modules": TARGETS["llama"], **more}
        adapted = peft.get_peft_model(plain("llama", base), peft.LoraConfig(**lora))
        g = torch.Generator().manual_seed(i)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=g)
        adapted.save_pretrained(tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
    wrong = read_by("vLLM", "llama", base, folders[0]) - read_by_peft("llama", base, folders[0])
    assert wrong.norm() > 1e-2  # the rules differ on what was not merged
    plan = make_plan([open_adapter(str(f)) for f in folders], [3, 1], True)
    done = merge_adapters(plan, tmp_path / "out", Options(rank=rank))
    expected = plain("llama", base)
    for site, layer in done.layers.items():
        exact = 0.75 * products(folders[0])[site] + 0.25 * products(folders[1])[site]
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        cut = u[:, : layer.rank] * s[: layer.rank] @ vh[: layer.rank]
        expected.get_submodule(site).weight.data += cut.float()
    assert len({layer.rank for layer in done.layers.values()}) > 1 or rank
    assert_read_alike("llama", base, tmp_path / "out", logits(expected))


def test_tight_keeps_ranks_and_says_whom_that_misleads(command, runs, tmp_path):
    folder = runs("llama")
    out = tmp_path / "out"
    code, said, err = command("export", folder / "run", "--tight", "--out", out)
    assert code == 0, err
    base = folder / "llama"
    uniform = folder / "run" / "final" / "adapter"
    expected = read_by_peft("llama", base, uniform)
    torch.testing.assert_close(read_by_peft("llama", base, out), expected, rtol=0, atol=1e-4)
    tensors, config = load_file(out / "adapter_model.safetensors"), read_config(out)
    ranks = {t.shape[0] for key, t in tensors.items() if "lora_A" in key}
    assert len(ranks) > 1 and config["rank_pattern"]
    told = said[said.index("--tight: llama.cpp") :].splitlines()[0]
    worst = [config["lora_alpha"] / rank for rank in ranks]
    factors = [alpha for alpha in worst if abs(alpha - 1) > 1e-6]
    spans = {f"{min(factors):.3g} to {max(factors):.3g} ×", f"{min(factors):.3g} ×"}
    assert any(span in told for span in spans)
    assert "vLLM" not in said  # every scale is 1, as lora_alpha / r is
    assert "llama.cpp" in (out / "README.md").read_text()
    off = read_by("llama.cpp", "llama", base, out) - expected
    assert off.norm() > 1e-3
    code, said, err = command("merge", uniform, "--tight", "--out", tmp_path / "merged")
    assert code == 0 and "--tight: llama.cpp" in said, err


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_export_takes_a_rank_or_an_error(command, runs, tmp_path):
    run = runs("llama") / "run"
    for options, text in (
        (["--rank", "auto"], "--rank auto: needs --error"),
        (["--error", "0.1"], "--error: goes with --rank auto only"),
        (["--rank", "0"], "--rank: expected a number of at least 1, or auto"),
        (["--rank", "x"], "no whole number"),
        (["--as", "model", "--tight"], "--tight: is about an adapter"),
        (["--as", "model", "--rank", "2"], "--rank: is about an adapter"),
        (["--as", "model", "--base-name", "a/b"], "--base-name: is about an adapter"),
    ):
        code, _, err = command("export", run, *options, "--out", tmp_path / "no")
        assert code == 2 and text in err and not (tmp_path / "no").exists()
    code, said, err = command("export", run, "--rank", "auto", "--error", "1e-2")
    assert code == 0 and f"{run}/final/adapter-error0.01" in said, err
    error = float(said.split("Relative error of the change: ")[1].split()[0])
    assert 0 < error <= 1e-2


def test_an_export_tells_what_a_cut_would_cost(runs, tmp_path, monkeypatch):
    for module in (config_module, export_module):
        monkeypatch.setattr(module, "SERVER_LIMITS", (2, 5))
    folder = runs("llama")
    whole = products(folder / "run" / "final" / "adapter")
    done = export_adapter(open_run(folder / "run"), tmp_path / "out")
    (note,) = [n for n in done.notes if n.startswith(f"rank {done.rank} is above 2, 5")]
    total = sum(m.norm() ** 2 for m in whole.values()) ** 0.5
    for rank in (2, 5):
        tails = [torch.linalg.svdvals(m)[rank:].norm() ** 2 for m in whole.values()]
        missed = (sum(tails) ** 0.5 / total).item()
        assert f"`rank={rank}` would miss {missed:.2g} of the change" in note


def test_ranks_above_what_servers_take_are_told_with_what_a_cut_would_cost(tmp_path):
    """By the singular values of a layer of rank 80."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(80, 100, generator=g), torch.randn(90, 80, generator=g)
    (tmp_path / "a").mkdir()
    names = [f"base_model.model.q.lora_{x}.weight" for x in "AB"]
    save_file(dict(zip(names, (a, b))), tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 80, "lora_alpha": 80, "target_modules": ["q"]}
    config |= {"base_model_name_or_path": "x"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    plan = make_plan([open_adapter(str(tmp_path / "a"))], None, True)
    done = merge_adapters(plan, tmp_path / "out")
    s = torch.linalg.svdvals(b.double() @ a.double())
    (note,) = done.notes
    assert note.startswith("rank 80 is above 64, where programs that serve adapters often stop")
    assert f"`rank=64` would miss {(s[64:].norm() / s.norm()).item():.2g} of the change" in note
    assert "128" not in note
    assert not merge_adapters(plan, tmp_path / "cut", Options(rank=64)).notes
