# pyright: reportAttributeAccessIssue=false
"""Generation on tiny models of real architectures, and what may not repeat in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import peft
import pytest
import torch
import transformers
from tiny import tiny, tokenizer_of

from fedex_lora.errors import UserError
from fedex_lora.tasks.generation import Decoding, NoRepeatNgram, generate
from fedex_lora.tasks.outputs import OutputFile

BEAMS = Decoding(max_new_tokens=9, num_beams=3, length_penalty=0.9, no_repeat_ngram=2)
PROMPTS = ["The quick brown fox jumps", "dog", "A file is opened", "dates and times are compared"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tokenizer(folder):
    return tokenizer_of(folder)


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def prompts(tokenizer):
    return tokenizer(PROMPTS)["input_ids"]


@pytest.mark.parametrize("decoding", [BEAMS, Decoding(9)], ids=["beams", "greedy"])
def test_texts_do_not_depend_on_the_batch(model, tokenizer, prompts, decoding):
    together = generate(model.train(), tokenizer, prompts, decoding, batch_size=12)
    alone = [generate(model, tokenizer, [ids], decoding, batch_size=1)[0] for ids in prompts]
    assert together == alone and len(set(alone)) > 1
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("longer", [0, 1])
def test_a_model_whose_rows_are_not_apart_gets_one_prompt_at_a_time(tokenizer, longer, caplog):
    """Those of RWKV see padding, and in transformers each other."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=len(tokenizer), context_length=64, **size)
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    prompts, decoding = [[5, 9, 7], [8, 20, 9, 11][: 3 + longer]], Decoding(9)
    alone = [generate(model, tokenizer, [ids], decoding, batch_size=3)[0] for ids in prompts]
    assert not caplog.records
    assert generate(model, tokenizer, prompts, decoding, batch_size=2) == alone
    assert "one prompt at a time" in caplog.text


def banned(row: Sequence[int], size: int) -> set[int]:
    """The tokens that would end an n-gram that is in the row already."""
    known = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
    tail = tuple(row[len(row) - size + 1 :])
    return {ngram[-1] for ngram in known if ngram[:-1] == tail}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_only_generated_ngrams_may_not_repeat(size):
    generator = torch.Generator().manual_seed(size)
    theirs = transformers.NoRepeatNGramLogitsProcessor(size)
    spared = bans = 0
    for length in [*range(7), 30]:
        ids = torch.randint(3, (5, 6 + length), generator=generator)
        scores = torch.randn(5, 4, generator=generator)
        before = scores.clone()
        found = NoRepeatNgram(size, start=6)(ids, scores)
        for row, old, new in zip(ids[:, 6:].tolist(), before, found):
            expected = banned(row, size) if len(row) >= size else set()
            assert set((new == -torch.inf).nonzero().flatten().tolist()) == expected
            allowed = [t for t in range(4) if t not in expected]
            assert torch.equal(new[allowed], old[allowed])
            bans += len(expected)
        spared += int((theirs(ids, before.clone()) < found).sum())
    assert bans and spared  # they forbid the prompt's n-grams too


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_texts_have_no_repeated_ngrams(model, tokenizer, prompts, num_beams, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: json.dumps(ids))
    free = generate(model, tokenizer, prompts, Decoding(40, num_beams), 12)
    bound = generate(
        model, tokenizer, prompts, Decoding(40, num_beams, no_repeat_ngram=2), batch_size=12
    )

    def repeats(texts):
        rows = [json.loads(text) for text in texts]
        return any(len({*pairwise(row)}) < len(row) - 1 for row in rows)

    assert repeats(free) and not repeats(bound)


def test_the_models_own_settings_have_no_influence(model, tokenizer, prompts):
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    expected = generate(model, tokenizer, prompts, Decoding(6), 4)
    first = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    base = model.get_base_model()
    base.generation_config.update(suppress_tokens=first, min_new_tokens=6, num_beams=2, top_k=3)
    own = base.generation_config
    before = own.to_dict()
    assert generate(model, tokenizer, prompts, Decoding(6), 4) == expected
    assert base.generation_config is own and own.to_dict() == before
    assert base.generate(torch.tensor(prompts[:1]), do_sample=False)[0, len(prompts[0])] != first[0]


class Talker(torch.nn.Module):
    """Says the same to every prompt."""

    def __init__(self, says):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.says = torch.tensor(says)

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, self.says.expand(len(input_ids), -1)], dim=1)


def test_what_follows_the_end_of_text_is_cut_off(tokenizer):
    dog, fox = (tokenizer(word)["input_ids"] for word in ("dog", "fox"))
    talker = Talker([*dog, tokenizer.eos_token_id, *fox])
    assert generate(talker, tokenizer, [fox, dog], Decoding(9), 2) == ["dog", "dog"]


def test_too_few_positions_are_an_error_where_positions_are_learned(folder, model, tokenizer):
    prompts = [[5], [5] * 150]
    if "llama" in folder.name:  # computes them
        assert len(generate(model, tokenizer, prompts, Decoding(20), 2)) == 2
    else:
        with pytest.raises(UserError, match=r"20 after a prompt of 150 tokens.* at most 160"):
            generate(model, tokenizer, prompts, Decoding(20), 2)


def test_an_interrupted_generation_goes_on(model, tokenizer, prompts, tmp_path, monkeypatch):
    expected = generate(model, tokenizer, prompts, BEAMS, 6)
    path, seen = tmp_path / "deep" / "outputs.jsonl", []

    def interrupt(done, total):
        seen.append((done, total))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts, BEAMS, 6, OutputFile(path, "key", interrupt))
    assert seen == [(0, 4), (2, 4)]  # batches of 6 sequences are two prompts with 3 beams
    asked = []
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: asked.append(kw["input_ids"]) or own(**kw))
    seen.clear()
    outputs = OutputFile(path, "key", lambda done, total: seen.append((done, total)))
    assert generate(model, tokenizer, prompts, BEAMS, 6, outputs) == expected
    assert [len(ids) for ids in asked] == [2] and seen == [(2, 4), (4, 4)]
    assert generate(model, tokenizer, prompts, BEAMS, 6, outputs) == expected
    assert len(asked) == 1  # nothing is left to do
