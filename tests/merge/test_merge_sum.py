# pyright: reportAttributeAccessIssue=false
"""Sums of adapters: weights as they are, also negative ones."""

import json

import peft
import pytest
import torch
import transformers
from merging import (
    CASES,
    CLS,
    CONFIG,
    FILE,
    LM,
    PREFIX,
    base,
    command,
    plain,
    save,
    saved,
    update,
)
from safetensors.torch import load_file

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.base import merge_into_base
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

__all__ = ["base", "command"]


@pytest.mark.parametrize("weights", [[0.7, 0.4, 0.2], [1.0, -1.0, 0.0], [-0.5, 2.0, 1e-3], None])
def test_a_sum_takes_weights_as_they_are(weights, base, tmp_path):
    case = CASES["llama"]
    adapters = saved(case, base("llama"), tmp_path)
    folders = [a.folder for a in adapters]
    plan = make_plan([open_adapter(str(f)) for f in folders], weights, True, is_sum=True)
    done = merge_adapters(plan, tmp_path / "out")
    merge_into_base(plan, str(base("llama")), tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(plain(base("llama"), case.auto), tmp_path / "out")
    before = plain(base("llama"), case.auto)
    written = getattr(transformers, case.auto).from_pretrained(tmp_path / "model")
    given = weights or [1.0, 1.0, 1.0]
    for site in adapters[0].factors:
        parts = [(w, *a.factors[site]) for w, a in zip(given, adapters)]
        exact = sum(w * s * b.double() @ a.double() for w, a, b, s in parts)
        got = loaded.get_base_model().get_submodule(site).get_delta_weight("default")
        assert (got - exact).norm() <= 1e-6 * exact.norm()
        new, old = (m.get_submodule(site).weight.double() for m in (written, before))
        assert (new - old - exact).norm() <= 1e-6 * exact.norm()
        assert done.layers[site].norm == pytest.approx(exact.norm().item(), rel=1e-6)
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["weights"] == given and report["sum"] is True


def test_one_adapter_at_half_strength_and_what_the_command_says(base, command, tmp_path):
    (one,) = [save(base("llama"), LM[0], tmp_path / "a", 0, **CASES["llama"].configs[0])]
    code, _, err = command(one.folder, "--sum", "--weights", "0.5", "--out", tmp_path / "out")
    assert code == 0, err
    loaded = peft.PeftModel.from_pretrained(plain(base("llama"), LM[0]), tmp_path / "out")
    for site in one.factors:
        exact = 0.5 * update([one], [1], site)
        got = loaded.get_base_model().get_submodule(site).get_delta_weight("default")
        assert (got - exact).norm() <= 1e-6 * exact.norm()
    for weights, text in (
        ("nan", "nan is no weight"),
        ("0", "all are 0"),
        ("1,1", "2 weights for 1"),
    ):
        options = ["--sum", "--weights", weights, "--out", tmp_path / "no"]
        code, _, err = command(one.folder, *options)
        assert code == 2 and text in err
    difference = ["--sum", "--weights=1,-1", "--report", "--out", tmp_path / "zero"]
    code, out, err = command(one.folder, one.folder, *difference)
    assert code == 0 and "Rank: 0, of 6 layers" in out and "Averaging" not in out, err
    code, _, err = command(one.folder, "--weights=-1", "--out", tmp_path / "no")
    assert code == 2 and "--sum takes them as they are" in " ".join(err.split())


def test_heads_in_a_sum_need_the_base_s_own(base, command, tmp_path):
    """W0 + Σ wᵢ(xᵢ − W0); a fresh head has no W0."""
    case = CASES["bert"]
    adapters = saved(case, base("bert"), tmp_path)
    folders = [a.folder for a in adapters]
    weights = ["--sum", "--weights", "0.5,0.25"]
    code, _, err = command(*folders, *weights, "--out", tmp_path / "out")
    text = " ".join(err.split())
    assert code == 2 and "classifier.bias was trained in full" in text and "--into-base" in text
    code, _, err = command(
        *folders, *weights, "--into-base", base("bert"), "--out", tmp_path / "out"
    )
    assert code == 2 and "was trained in full" in err
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        base("bert"), num_labels=3
    )
    classifier.save_pretrained(tmp_path / "classifier")
    options = ["--into-base", tmp_path / "classifier", "--out", tmp_path / "out"]
    code, _, err = command(*folders, *weights, *options)
    assert code == 0, err
    written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    own = classifier.classifier.weight.double()
    one, two = (a.head["classifier.weight"].double() for a in adapters)
    exact = own + 0.5 * (one - own) + 0.25 * (two - own)
    torch.testing.assert_close(written.classifier.weight.double(), exact, rtol=1e-6, atol=1e-7)
    # weights that sum to 1 are a mean: no base is needed
    code, _, err = command(*folders, "--sum", "--weights", "1.5,-0.5", "--out", tmp_path / "mean")
    assert code == 0, err
    got = load_file(tmp_path / "mean" / FILE)[f"{PREFIX}classifier.weight"]
    torch.testing.assert_close(got.double(), 1.5 * one - 0.5 * two, rtol=1e-6, atol=1e-6)
    assert CLS[1] == json.loads((tmp_path / "mean" / CONFIG).read_text())["task_type"]
