"""Vocabularies that training enlarged, embeddings that were saved along, and names of bases."""

import json

import peft
import pytest
import torch
from architectures import build, logits, off, reload
from merging import command
from safetensors.torch import load_file, save_file

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.base import merge_into_base
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

__all__ = ["command"]
TOKENS = 70  # of 64
WIDE = torch.randint(3, TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def made(tmp_path):
    """A function that makes a base and two adapters of a larger vocabulary; returns the model."""

    def make(
        kind="llama",
        tie=False,
        rows=(5, 5),
        modules=None,
        targets=("q_proj",),
        tokens=None,
        size=TOKENS,
    ):
        model = build(kind, tie_word_embeddings=tie)
        model.save_pretrained(tmp_path / "base")
        for i, seed in enumerate(rows):
            lora = peft.LoraConfig(
                r=2 + i,
                lora_alpha=5,
                task_type="CAUSAL_LM",
                target_modules=list(targets),
                modules_to_save=modules,
                trainable_token_indices=tokens,
            )
            adapted = peft.get_peft_model(grown(model, tmp_path, seed, size), lora)
            g = torch.Generator().manual_seed(i)
            trained = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
            for name, parameter in adapted.named_parameters():
                if any(part in name for part in trained):
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
            more = "auto" if tokens else not modules
            adapted.save_pretrained(tmp_path / f"a{i}", save_embedding_layers=more)
            (tmp_path / f"a{i}" / "tokenizer.json").write_text(f"of a{i}")
        return model

    return make


def grown(model, folder, seed, size=TOKENS):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        larger = reload(model, folder / "base")
        larger.resize_token_embeddings(size, mean_resizing=False)
    return larger


def planned(folder, **options):
    return make_plan([open_adapter(str(folder / f"a{i}")) for i in (0, 1)], [3, 1], True, **options)


CASES = {
    "untied": {},
    "tied": {"tie": True},
    "vision-language": {"kind": "llava"},
    "trained": {"modules": ["embed_tokens", "lm_head"]},
    "adapted": {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    "tied and adapted": {"tie": True, "targets": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_enlarged_with_the_adapters_own_rows(name, made, tmp_path):
    """As PEFT says it with the merged adapter on a base that was enlarged at random."""
    model = made(**CASES[name])
    merge_adapters(planned(tmp_path), tmp_path / "adapter")
    by_peft = peft.PeftModel.from_pretrained(grown(model, tmp_path, 77), tmp_path / "adapter")
    done = merge_into_base(planned(tmp_path), str(tmp_path / "base"), tmp_path / "out")
    written = reload(model, tmp_path / "out")
    assert written.get_input_embeddings().weight.shape[0] == TOKENS
    assert off(logits(written, WIDE), logits(by_peft, WIDE)) < 1e-6
    assert written.config.get_text_config().vocab_size == TOKENS
    untied = name == "tied and adapted"
    tied = bool(CASES[name].get("tie")) and not untied
    assert written.config.get_text_config().tie_word_embeddings == tied
    assert any("shared one weight" in note for note in done.notes) == untied
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "of a0"
    assert f"tokenizer is that of {tmp_path}/a0" in " ".join(done.notes)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
def test_what_the_config_ties_and_the_files_do_not(target, made, tmp_path):
    """transformers then takes both as they are; so do the merges, and nothing goes from one to
    the other."""
    model = made(tie=True, size=64, targets=[target])
    file = tmp_path / "base" / "model.safetensors"
    held = load_file(file)
    head = torch.randn(
        64, len(held["model.norm.weight"]), generator=torch.Generator().manual_seed(3)
    )
    save_file(held | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    for i in (0, 1):  # PEFT saved copies of the head that was tied
        saved = load_file(tmp_path / f"a{i}" / WEIGHTS)
        kept = {k: t for k, t in saved.items() if "lora_" in k or "lm_head" not in k}
        save_file(kept, tmp_path / f"a{i}" / WEIGHTS)
    merge_adapters(planned(tmp_path), tmp_path / "adapter")
    by_peft = peft.PeftModel.from_pretrained(reload(model, tmp_path / "base"), tmp_path / "adapter")
    merge_into_base(planned(tmp_path), str(tmp_path / "base"), tmp_path / "out")
    written = reload(model, tmp_path / "out")
    assert off(logits(written, WIDE.clamp(max=63)), logits(by_peft, WIDE.clamp(max=63))) < 1e-6
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, before in {**held, "lm_head.weight": head}.items():
        assert torch.equal(after[name], before) == (target not in name), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("size", [64, TOKENS])
def test_tokens_that_were_trained_by_themselves(tie, size, made, command, tmp_path):
    model = made(tie=tie, tokens=[5, 63 if size == 64 else 69], size=size)
    merge_adapters(planned(tmp_path), tmp_path / "adapter")
    by_peft = peft.PeftModel.from_pretrained(grown(model, tmp_path, 77, size), tmp_path / "adapter")
    merge_into_base(planned(tmp_path), str(tmp_path / "base"), tmp_path / "out")
    written = reload(model, tmp_path / "out")
    inputs = WIDE.clamp(max=size - 1)
    inputs[0, :2] = torch.tensor([5, size - 1])
    expected = logits(by_peft, inputs)
    assert off(logits(written, inputs), expected) < 1e-6
    assert written.config.tie_word_embeddings == tie
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    one, two = (load_file(tmp_path / f"a{i}" / WEIGHTS)[key] for i in (0, 1))
    rows = written.get_input_embeddings().weight[[5, 63 if size == 64 else 69]]
    torch.testing.assert_close(rows, 0.75 * one + 0.25 * two)
    config = tmp_path / "a1" / "adapter_config.json"
    other = json.loads(config.read_text()) | {"trainable_token_indices": [5, 6]}
    config.write_text(json.dumps(other))
    both = (tmp_path / "a0", tmp_path / "a1")
    code, _, err = command(*both, "--out", tmp_path / "no")
    assert code == 2 and "trainable_token_indices: " in err
    config.write_text(json.dumps(other | {"trainable_token_indices": [5]}))
    code, _, err = command(*both, "--out", tmp_path / "no")
    assert code == 2 and "has 2 rows, trainable_token_indices" in err


def test_rows_that_nobody_saved_are_named(made, tmp_path):
    made(modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(64, 16\).*hold no rows for it"):
        merge_into_base(planned(tmp_path), str(tmp_path / "base"), tmp_path / "out")
    made(targets=["q_proj", "lm_head"])
    for i in (0, 1):
        file = tmp_path / f"a{i}" / WEIGHTS
        save_file({k: t for k, t in load_file(file).items() if ".lora_" in k}, file)
    with pytest.raises(ValueError, match=r"lm_head is 64 × 16.*70 × 16.*no rows for the new"):
        merge_into_base(planned(tmp_path), str(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_that_differ_get_a_way_on(made, command, tmp_path):
    model = made(rows=(5, 6))
    key = "base_model.model.model.embed_tokens.weight"
    stored = [load_file(tmp_path / f"a{i}" / WEIGHTS)[key] for i in (0, 1)]
    assert not torch.equal(*stored)
    code, _, err = command(tmp_path / "a0", tmp_path / "a1", "--out", tmp_path / "out")
    assert code == 2 and "--embeddings mean" in err and "--embeddings 1" in err
    assert not (tmp_path / "out").exists()
    wanted = {"1": stored[0], "2": stored[1], "mean": 0.75 * stored[0] + 0.25 * stored[1]}
    for which, expected in wanted.items():
        options = ["--weights", "3,1", "--embeddings", which, "--out"]
        for out, more in ((f"a-{which}", []), (f"b-{which}", ["--into-base", tmp_path / "base"])):
            arguments = [tmp_path / "a0", tmp_path / "a1", *more, *options, tmp_path / out]
            code, _, err = command(*arguments)
            assert code == 0, err
        got = load_file(tmp_path / f"a-{which}" / WEIGHTS)[key]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        written = reload(model, tmp_path / f"b-{which}")
        assert torch.equal(written.get_input_embeddings().weight, got)
        owner = {"1": "a0", "2": "a1", "mean": "a0"}[which]
        assert (tmp_path / f"b-{which}" / "tokenizer.json").read_text() == f"of {owner}"
    code, _, err = command(
        tmp_path / "a0", tmp_path / "a1", "--embeddings", "3", "--out", tmp_path / "out"
    )
    assert code == 2 and "1 to 2" in err


def test_vocabularies_of_two_sizes(made, command, tmp_path):
    made()
    file = tmp_path / "a1" / WEIGHTS
    cut = {k: t[:66] if "lora" not in k else t for k, t in load_file(file).items()}
    save_file({k: t.contiguous() for k, t in cut.items()}, file)
    both = (tmp_path / "a0", tmp_path / "a1")
    code, _, err = command(*both, "--out", tmp_path / "out")
    assert code == 2 and "shape of base_model.model.lm_head.weight" in err
    assert "--embeddings 1 takes those of the first" in err
    code, _, err = command(*both, "--embeddings", "2", "--out", tmp_path / "out")
    assert code == 0, err
    shapes = {
        tuple(t.shape) for k, t in load_file(tmp_path / "out" / WEIGHTS).items() if "lora" not in k
    }
    assert shapes == {(66, 16)}


def test_a_slash_at_the_end_is_no_other_base_and_no_name_no_folder(made, command, tmp_path):
    made(size=64)
    config = tmp_path / "a1" / "adapter_config.json"
    one = json.loads((tmp_path / "a0" / "adapter_config.json").read_text())
    (tmp_path / "a0" / "adapter_config.json").write_text(
        json.dumps(one | {"base_model_name_or_path": "an/id"})
    )
    other = json.loads(config.read_text())
    config.write_text(json.dumps(other | {"base_model_name_or_path": "an/id/"}))
    both = (tmp_path / "a0", tmp_path / "a1")
    code, _, err = command(*both, "--out", tmp_path / "out")
    assert code == 0, err
    cached = (
        "/home/ann/.cache/huggingface/hub/models--an--id/snapshots/e2da8e2"  # of another machine
    )
    config.write_text(json.dumps(other | {"base_model_name_or_path": cached}))
    code, _, err = command(*both, "--out", tmp_path / "cached")
    assert code == 0, err
    config.write_text(json.dumps(other | {"base_model_name_or_path": ""}))
    code, _, err = command(*both, "--out", tmp_path / "no")
    assert code == 2 and f"base model: {both[0]} 'an/id', {both[1]} ''" in err


def test_names_of_base_models_alone_can_be_passed_over(made, command, tmp_path):
    made()
    config = tmp_path / "a1" / "adapter_config.json"
    other = json.loads(config.read_text()) | {"base_model_name_or_path": "/data/a/copy"}
    config.write_text(json.dumps(other | {"revision": "v2"}))
    both = (tmp_path / "a0", tmp_path / "a1")
    code, _, err = command(*both, "--out", tmp_path / "out")
    assert code == 2 and "/data/a/copy" in err and "--ignore-base-name" in err
    code, out, err = command(*both, "--ignore-base-name", "--out", tmp_path / "out")
    assert code == 0 and "Passed over: base model: " in out and "/data/a/copy" in out
    assert len(load_file(tmp_path / "out" / WEIGHTS)) == len(load_file(tmp_path / "a0" / WEIGHTS))
    # of names alone: layers that differ are refused as before
    file = tmp_path / "a1" / WEIGHTS
    save_file({k: t for k, t in load_file(file).items() if "layers.1" not in k}, file)
    code, _, err = command(*both, "--ignore-base-name", "--out", tmp_path / "other")
    assert code == 2 and "layers that not all adapters have" in err and "/data" not in err
