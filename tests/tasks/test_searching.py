# pyright: reportAttributeAccessIssue=false
"""Searches that drop ended texts, against transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import BOTH, tiny

from fedex_lora.tasks.base import pad
from fedex_lora.tasks.generation import NoRepeatNgram
from fedex_lora.tasks.searching import Live, beams, greedy

NEW, END = 14, 7


@pytest.fixture(scope="module", params=["gpt2", "gemma2", "t5"])
def model(request, tmp_path_factory):
    kind = request.param
    more = {"sliding_window": 8} if kind == "gemma2" else {}
    folder = tiny(kind, tmp_path_factory.mktemp(kind), **more)
    auto = transformers.AutoModelForSeq2SeqLM if kind in BOTH else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    model.generation_config = transformers.GenerationConfig()
    return model


@pytest.fixture(scope="module")
def batch(model):
    """Ten prompts of three to twelve tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 13, (10,), generator=generator).tolist()
    rows = [
        {"ids": torch.randint(9, 200, (n,), generator=generator).tolist(), "there": [1] * n}
        for n in lengths
    ]
    side = "right" if model.config.is_encoder_decoder else "left"
    return {
        "input_ids": pad(rows, "ids", 0, side=side),
        "attention_mask": pad(rows, "there", 0, side=side),
    }


class Leaning:
    """A logits processor: makes the end likely after some texts."""

    def __call__(self, ids, scores):
        scores[:, END] += torch.where(ids.sum(dim=1) % 5 == 0, 9.0, 0.0)
        return scores


def searched(model, batch, end, width=1, penalty=1.0, size=0, own=None):
    """The texts up to their end, of transformers' search or of `own`."""
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    wide = {"num_beams": width, "length_penalty": penalty, "early_stopping": False}
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        **(wide if width > 1 and own is None else {}),
    )
    processors = [NoRepeatNgram(size, start)] if size else []
    processors += [Leaning()] if end is not None else []
    found = model.generate(
        **batch,
        generation_config=settings,
        custom_generate=own,
        logits_processor=transformers.LogitsProcessorList(processors),
    )
    texts = found[:, start:].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in texts]


@pytest.fixture
def fed(monkeypatch):
    """How many sequences the model was asked for, step by step."""
    seen, own = [], Live.logits
    monkeypatch.setattr(Live, "logits", lambda live: seen.append(len(live.ids)) or own(live))
    return seen


def test_greedy_texts_are_those_of_transformers(model, batch, fed):
    theirs = searched(model, batch, END)
    assert len({len(ids) for ids in theirs}) > 1
    assert searched(model, batch, END, own=greedy(NEW, END)) == theirs
    # a text is asked for as often as it has tokens
    assert fed == [sum(len(ids) > step for ids in theirs) for step in range(len(fed))]
    assert searched(model, batch, None, own=greedy(NEW, None)) == searched(model, batch, None)


@pytest.mark.parametrize(("penalty", "size"), [(1.0, 0), (0.6, 2), (-1.0, 0), (3.0, 1)])
def test_beams_find_what_those_of_transformers_find(model, batch, penalty, size, fed):
    theirs = searched(model, batch, END, 3, penalty, size)
    assert searched(model, batch, END, 3, penalty, size, beams(NEW, END, 3, penalty)) == theirs
    # a prompt is put through the model once, and its beams leave with it
    assert fed[:2] == [10, 30] and fed[-1] < 30 and fed[1:] == sorted(fed[1:], reverse=True)
    assert len({len(ids) for ids in theirs}) > 1


def test_without_an_end_beams_go_on_to_the_last_token(model, batch):
    theirs = searched(model, batch, None, 2, 1.0)
    assert searched(model, batch, None, 2, own=beams(NEW, None, 2, 1.0)) == theirs
    assert all(len(ids) == NEW for ids in theirs)
