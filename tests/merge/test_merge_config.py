"""Configs of adapters as programs and editors write them, and files beside them."""

import pytest
import torch
from merging import CONFIG, FILE, base, bert, edit, merge
from safetensors.torch import load_file

from fedex_lora.errors import UserError
from fedex_lora.merge.adapters import open_adapter

__all__ = ["base", "bert"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark(bert, encoding, tmp_path):
    merge(bert, tmp_path / "expected", [3, 1])
    for folder in bert:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    merge(bert, tmp_path / "out", [3, 1])
    expected, got = (load_file(tmp_path / n / FILE) for n in ("expected", "out"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a number"),
        ({"r": 4.0}, "r is 4.0; expected a whole number"),
        ({"r": None}, "r is None; expected a whole number"),
        (
            {"rank_pattern": {"query": 2.5}},
            "rank_pattern is .* numbers by the names of layers, whole",
        ),
        ({"alpha_pattern": {"query": None}}, "alpha_pattern is .* numbers by the names of layers"),
        ({"peft_type": None, "fine_tune_type": "lora", "num_layers": 2}, r"MLX.s own form"),
    ],
)
def test_what_is_wrong_in_a_config_is_said_once(bert, fields, message, tmp_path):
    edit(bert[0], **fields)
    with pytest.raises(UserError, match=message) as told:
        open_adapter(str(bert[0]))
    assert "num_layers" not in str(told.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("file", [CONFIG, FILE])
def test_a_pointer_of_git_lfs_is_called_one(bert, file):
    (bert[0] / file).write_text(POINTER)
    with pytest.raises(UserError, match=f"{file}.* a pointer of Git LFS.*git lfs pull"):
        open_adapter(str(bert[0]))


def test_a_link_to_nothing_is_called_one(bert):
    (bert[0] / FILE).unlink()
    (bert[0] / FILE).symlink_to("../../blobs/4d7a2146")
    with pytest.raises(UserError, match=f"{FILE} is a link to .*4d7a2146, which is not there"):
        open_adapter(str(bert[0]))


def test_other_files_of_tensors_are_named(bert):
    (bert[0] / FILE).rename(bert[0] / "adapters.safetensors")
    with pytest.raises(UserError, match=r"there is no .*; there is adapters\.safetensors"):
        open_adapter(str(bert[0]))
