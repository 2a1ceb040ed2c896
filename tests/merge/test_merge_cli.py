"""The command `merge`: what a user sees, above all when something is wrong."""

import json
import os
import shutil

import pytest
import torch
from merging import CASES, LM, base, command, save, saved
from safetensors.torch import load_file, save_file

from fedex_lora.merge import room

__all__ = ["base", "command"]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Three adapters that go together."""
    folder = tmp_path_factory.mktemp("adapters")
    return [a.folder for a in saved(CASES["llama"], base("llama"), folder)]


@pytest.fixture
def adapters(made, tmp_path):
    """Copies of them to be damaged."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in made]


@pytest.fixture
def refused(command, tmp_path):
    """Asserts that a merge is refused with a text, and that nothing is left or changed."""

    def check(*arguments, text):
        before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
        code, _, err = command(*arguments, "--out", tmp_path / "out")
        assert code == 2 and text in " ".join(err.split()), err
        assert "Traceback" not in err
        assert {p: p.stat().st_size for p in tmp_path.rglob("*")} == before

    return check


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def test_a_merge_and_what_it_says(adapters, command, tmp_path):
    code, out, err = command(*adapters, "--weights", "3,1,1", "--out", tmp_path / "out", "--report")
    assert code == 0, err
    assert (
        "Rank: 7 to 9, of 6 layers; all are padded to 9" in out
        and "Averaging the factors would miss" in out
    )
    assert "model.layers.0.mlp.down_proj" in out and "PeftModel.from_pretrained" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        CONFIG,
        WEIGHTS,
        "merge.json",
    ]
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["weights"] == [0.6, 0.2, 0.2]
    assert (tmp_path / "out" / WEIGHTS).stat().st_mode == (tmp_path / "out" / CONFIG).stat().st_mode
    code, out, _ = command(*adapters, "--out", tmp_path / "two", "--rank", 2, "--dtype", "bfloat16")
    assert code == 0 and "Rank: 2, of 6" in out and "Cut off: 0." in out and "Rounded off" in out
    code, out, _ = command(*adapters, "--out", tmp_path / "a", "--rank", "auto", "--error", "0.2")
    assert code == 0 and "Cut off: 0.1" in out


def test_weights_and_ranks_that_make_no_sense(adapters, refused):
    for weights, text in (
        ("1,1", "2 weights for 3 adapters"),
        ("1,-1,1", "-1 is negative, and a mean has no negative weights; --sum takes them"),
        ("1,nan,1", "nan is no weight"),
        ("1,inf,1", "inf is no weight"),
        ("0,0,0", "sum is 0"),
        ("1,a,1", "are no numbers"),
        ("", "'' are no numbers"),
        ("3,,1,1", "'3,,1,1' are no numbers"),
        ("1e308,1e308,1", "sum is 0 or too large"),
    ):
        refused(*adapters, "--weights", weights, text=text)
    refused(*adapters, "--rank", "0", text="at least 1")
    refused(*adapters, "--rank", "many", text="no whole number")
    refused(*adapters, "--rank", "auto", text="needs --error")
    refused(*adapters, "--rank", "auto", "--error", "2", text="needs --error")
    refused(*adapters, "--rank", "2", "--error", "0.1", text="goes with --rank auto")


def test_adapters_that_do_not_go_together(adapters, base, refused, command, tmp_path):
    edit(adapters[1], base_model_name_or_path="another/model")
    refused(*adapters, text="base model: ")
    code, out, _ = command(*adapters, "--no-strict", "--out", tmp_path / "out")
    assert code == 0 and "another/model" in out
    shutil.rmtree(tmp_path / "out")
    edit(adapters[2], revision="v2")
    refused(*adapters, text="revision of the base model")
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_fc"]}
    other = save(base("gpt2"), LM[0], tmp_path / "other", 0, **config).folder
    refused(adapters[0], other, "--no-strict", text="no layer is adapted by all")


def test_a_layer_of_another_shape_is_refused_even_without_strict(adapters, refused):
    tensors = load_file(adapters[1] / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(tensors[key].shape[0], 99)}, adapters[1] / WEIGHTS)
    refused(*adapters, "--no-strict", text="q_proj: ΔW is 16 × 16 in")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"some_new_field": 3}, "some_new_field"),
        ({"r": 5, "rank_pattern": {}}, "has rank 2 in the file and 5"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; expected a number"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]; expected numbers by the names"),
        ({"lora_alpha": float("nan")}, "has the scale nan"),
        ({"lora_alpha": 10**400}, "not what PEFT writes"),
        ({"lora_alpha": 1e39}, "is too large for float32"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type is ['CAUSAL_LM']; expected a text"),
        ({"auto_mapping": "x"}, "auto_mapping is 'x'; expected an object"),
        ({"target_parameters": [1]}, "target_parameters is [1]; expected a list of names"),
        ({"r": -2, "rank_pattern": {}}, "has rank 2 in the file and -2"),
        ({"modules_to_save": 5}, "modules_to_save is 5; expected a list of names"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'; expected a list of names"),
    ],
)
def test_adapters_of_other_kinds(adapters, refused, fields, text):
    edit(adapters[1], **fields)
    refused(*adapters, text=text)


def test_a_task_that_peft_does_not_know_is_refused_before_anything_is_written(adapters, refused):
    for folder in adapters:
        edit(folder, task_type="NOPE")
    refused(*adapters, text="PEFT does not take task_type 'NOPE'")


@pytest.mark.parametrize(
    ("dtype", "size", "text"),
    [
        (torch.float8_e4m3fn, 1.0, "has dtype torch.float8_e4m3fn; expected one of"),
        (torch.int64, 1.0, "has dtype torch.int64; expected one of"),
        (torch.complex64, 1.0, "has dtype torch.complex64; expected one of"),
        (torch.float64, 1e100, "is too large for float32"),
    ],
)
def test_factors_of_other_dtypes(adapters, refused, dtype, size, text):
    tensors = load_file(adapters[1] / WEIGHTS)
    changed = {k: (t.double() * size).to(dtype) for k, t in tensors.items()}
    save_file(changed, adapters[1] / WEIGHTS)
    refused(*adapters, text=text)


def test_tensors_that_are_damaged(adapters, refused):
    file = adapters[1] / WEIGHTS
    tensors = load_file(file)
    key = next(k for k in sorted(tensors) if "k_proj.lora_B" in k)
    bad = tensors[key].clone()
    bad[1, 1] = float("nan")
    save_file(tensors | {key: bad}, file)
    refused(*adapters, text=f"{key} in {file} holds NaN")
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    refused(*adapters, text="has only one of its two factors")
    save_file(tensors | {"base_model.model.x.lora_magnitude_vector": bad}, file)
    refused(*adapters, text="lora_magnitude_vector")
    save_file(tensors | {key: torch.zeros(8, 2, 1)}, file)
    refused(*adapters, text="expected A (r, in) and B (out, r)")
    save_file({"x": bad}, file)
    refused(*adapters, text="holds no LoRA factors")
    save_file(tensors, file)
    os.truncate(file, file.stat().st_size - 4)
    refused(*adapters, text="truncated or damaged")
    file.write_bytes(b"")
    refused(*adapters, text="truncated or damaged")
    file.unlink()
    refused(*adapters, text="there is no adapter_model.safetensors")
    (adapters[1] / CONFIG).write_text("{")
    refused(*adapters, text="cannot be read")
    (adapters[1] / CONFIG).write_text("[]")
    refused(*adapters, text="expected a JSON object")


def test_a_dtype_that_is_too_narrow(adapters, refused):
    tensors = load_file(adapters[1] / WEIGHTS)
    save_file({k: t * 1e6 for k, t in tensors.items()}, adapters[1] / WEIGHTS)
    refused(*adapters, "--dtype", "float16", text="is too large for torch.float16")


def test_pickles_only_when_allowed(adapters, refused, command, tmp_path):
    expected = command(*adapters, "--out", tmp_path / "expected")
    tensors = load_file(adapters[1] / WEIGHTS)
    (adapters[1] / WEIGHTS).unlink()
    torch.save(tensors, adapters[1] / PICKLE)
    refused(*adapters, text="--allow-pickle")
    code, _, err = command(*adapters, "--allow-pickle", "--out", tmp_path / "out")
    assert expected[0] == code == 0, err
    left, right = (load_file(tmp_path / n / WEIGHTS) for n in ("expected", "out"))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    torch.save({"a": os.system}, adapters[1] / PICKLE)
    refused(*adapters, "--allow-pickle", text="truncated or damaged")
    (adapters[1] / PICKLE).write_bytes(b"PK")
    refused(*adapters, "--allow-pickle", text="truncated or damaged")


def test_places_that_are_in_use_or_inside_an_input(adapters, command, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, text in (
        (tmp_path / "used", "exists and is not empty"),
        (tmp_path / "file", "exists and is not empty"),
        (adapters[1] / "merged", "which is read"),
        (tmp_path / "file" / "out", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        code, _, err = command(*adapters, "--out", out)
        assert code == 2 and text in err
    assert (tmp_path / "used" / "precious").read_text() == "x"
    (tmp_path / "free").mkdir()
    assert command(*adapters, "--out", tmp_path / "free")[0] == 0


def test_too_little_disk_or_memory_is_foreseen(adapters, refused, monkeypatch):
    usage = shutil.disk_usage(adapters[0])
    with monkeypatch.context() as patched:
        patched.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=100))
        refused(*adapters, text="only 100 B are free")
    memory = room.psutil.virtual_memory()
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory._replace(available=100))
    refused(*adapters, text="of memory while it is merged")


def test_a_failure_half_way_leaves_nothing(adapters, refused, monkeypatch):
    def full(_self, _key):
        raise OSError(28, "No space left on device")

    edit(adapters[0], modules_to_save=["norm"])
    for adapter in adapters:
        tensors = load_file(adapter / WEIGHTS)
        save_file(
            tensors | {"base_model.model.model.norm.weight": torch.ones(3)}, adapter / WEIGHTS
        )
    monkeypatch.setattr("fedex_lora.merge.plan.Plan.copy", full)
    refused(*adapters, text="cannot be written: No space left on device")


def test_names_that_are_no_adapters(adapters, refused, tmp_path):
    refused(tmp_path / "absent", text="there is no")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", text=CONFIG)


def test_hub_ids_are_downloaded_without_pickles(made, command, refused, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, revision):
        if name == "me/absent":
            raise OSError("404 Client Error")
        asked.append((name, allow_patterns, revision))
        return str(made[int(name[-1])])

    monkeypatch.setattr("fedex_lora.merge.adapters.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    refused("me/absent", text="me/absent: no such folder, and not to be had from the hub: 404")
    code, _, err = command("me/a0", "me/a1", "--out", tmp_path / "out")
    assert code == 0, err
    assert asked == [(name, [CONFIG, WEIGHTS], None) for name in ("me/a0", "me/a1")]
