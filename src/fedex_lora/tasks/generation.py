"""Texts that a causal language model generates for prompts, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

from fedex_lora.errors import RecipeError
from fedex_lora.tasks.base import evaluating, learned_positions, longest_first, pad, padding
from fedex_lora.tasks.lazy import PreTrainedTokenizerBase, Tensor, nn, torch, transformers
from fedex_lora.tasks.metrics import exact_match
from fedex_lora.tasks.outputs import Outputs
from fedex_lora.tasks.searching import Live, beams, greedy, inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; always the likeliest, never a sample.

    Attributes:
        max_new_tokens: Of one text; the end-of-text token is one of them.
        num_beams: Of beam search; 1 is greedy search.
        length_penalty: With beams: a finished text scores log p / length^length_penalty.
        no_repeat_ngram: No n-gram of this size occurs twice among a text's generated tokens,
            whatever is in its prompt; 0 allows all.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def of_at_most(self, max_new_tokens: int | None) -> Decoding:
        """The same, of texts of another length, if one is given."""
        return replace(self, max_new_tokens=max_new_tokens or self.max_new_tokens)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    outputs: Outputs | None = None,
) -> list[str]:
    """The text that follows each prompt, up to the end-of-text token.

    Prompts are generated from longest first, in batches padded on the left; one at a time where
    a batch would change the texts. The model's own settings (its `generation_config`) have no
    influence. Training modes are left as they were.

    Args:
        model: A transformers or PEFT causal language model.
        prompts: Token ids, at least one each.
        batch_size: How many sequences are decoded at once; each beam is one.
        outputs: Keeps what was generated, and knows what need not be generated again.

    Raises:
        UserError: The model has not enough positions for a prompt and what is to follow.
    """
    check_positions(model, prompts, decoding.max_new_tokens)

    def generated(rows: Sequence[int], device: torch.device) -> list[str]:
        return _generate(model, tokenizer, [prompts[i] for i in rows], decoding, device)

    if batch_size > 1 and len(prompts) > 1:
        one = min(prompts, key=len)
        room = max(map(len, prompts)) + decoding.max_new_tokens - len(one)
        batch_size = batch_size if _rows_apart(model, tokenizer, one, room) else 1
    return batches(generated, model, prompts, decoding, batch_size, outputs)


def generate_from_encoded(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    outputs: Outputs | None = None,
) -> list[str]:
    """`generate` with a model that encodes the prompts and decodes the texts: padded on the right.

    Raises:
        UserError: The model has not enough positions for the texts.
    """
    check_positions(model, [], decoding.max_new_tokens)

    def generated(rows: Sequence[int], device: torch.device) -> list[str]:
        return _decode(model, tokenizer, [prompts[i] for i in rows], decoding, device)

    return batches(generated, model, prompts, decoding, batch_size, outputs)


def batches(
    generated: Callable[[Sequence[int], torch.device], list[str]],
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    outputs: Outputs | None,
) -> list[str]:
    """What `generated` makes of the prompts, which it is given by number, longest first."""
    texts = outputs.begin(asdict(decoding), prompts) if outputs else {}
    left = [i for i in range(len(prompts)) if i not in texts]
    lengths = [len(prompts[i]) for i in left]
    with evaluating(model) as device, _without_own_settings(model):
        for batch in longest_first(lengths, max(1, batch_size // decoding.num_beams)):
            rows = [left[i] for i in batch]
            found = generated(rows, device)
            texts |= (new := dict(zip(rows, found, strict=True)))
            if outputs:
                outputs.add(new)
    return [texts[i] for i in range(len(prompts))]


def _rows_apart(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], room: int
) -> bool:
    """Whether a prompt goes on as it does alone where it is padded and beside another one.

    Not every model leaves padding and other rows out of account, so it is tried, once.

    Args:
        room: How many tokens more the model is known to have positions for.
    """
    found: list[Tensor] = []

    def look(model: Any, input_ids: Tensor, generation_config: Any, **kept: Any) -> Tensor:
        live = Live(model, input_ids, generation_config, inputs(kept))
        first = live.logits()
        rows = torch.arange(len(first), device=first.device)
        live.go_on(rows, torch.full_like(rows, prompt[-1]))
        found.append(torch.cat([first[0], live.logits()[0]]))
        return input_ids

    if model not in _apart:
        longer = [*prompt, *[prompt[-1]] * min(3, room - 1)]
        with evaluating(model) as device, _without_own_settings(model):
            _generate(model, tokenizer, [prompt], Decoding(2), device, custom_generate=look)
            if found:  # a model may have a `generate` of its own
                both = [prompt, longer]
                _generate(model, tokenizer, both, Decoding(2), device, custom_generate=look)
        exact = getattr(model, "dtype", None) == torch.float32
        _apart[model] = not found or _alike(*found, rounding=1e-3 if exact else 0.1)
        if not _apart[model]:
            logger.warning("the model's answers change in a batch: one prompt at a time")
    return _apart[model]


_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _alike(one: Tensor, other: Tensor, *, rounding: float) -> bool:
    """Whether logits are the same but for rounding, relative to their spread."""
    return bool((other - one).norm() <= rounding * (one - one.mean()).norm())


def verdicts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    more: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What `Outputs.verdicts` takes: each row's number, prompt and output, and what `more` says."""
    asked = tokenizer.batch_decode([list(ids) for ids in prompts], skip_special_tokens=True)
    return [
        {"row": row, "prompt": prompt, "output": text, **verdict}
        for row, (prompt, text, verdict) in enumerate(zip(asked, texts, more, strict=True))
    ]


def matched(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    references: Sequence[str],
    outputs: Outputs | None,
) -> float:
    """The share of texts that are what they should be; `outputs`, if given, keeps each verdict."""
    if outputs:
        right = [exact_match([t], [r]) == 1 for t, r in zip(texts, references)]
        more = [{"reference": r, "correct": c} for r, c in zip(references, right)]
        outputs.verdicts(verdicts(tokenizer, prompts, texts, more))
    return exact_match(texts, references)


class NoRepeatNgram:
    """A logits processor: forbids tokens that would repeat an n-gram among those after position
    `start`.

    Transformers' own processor counts the prompt's n-grams too, so that a model may not repeat
    what it was asked about.
    """

    def __init__(self, size: int, start: int) -> None:
        self.size = size
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (sequences × vocabulary), −inf where the token would end a known n-gram."""
        generated = input_ids[:, self.start :]
        if generated.shape[1] < self.size:
            return scores
        known = generated.unfold(1, self.size, 1)  # sequences × n-grams × size
        tail = generated[:, generated.shape[1] - self.size + 1 :]
        repeats = (known[..., :-1] == tail[:, None]).all(dim=-1)
        limits = torch.where(repeats, -torch.inf, torch.inf).to(scores.dtype)
        return scores.scatter_reduce(1, known[..., -1], limits, "amin")


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    device: torch.device,
    **more: Any,
) -> list[str]:
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in prompts]
    # on the left, so that every prompt ends where its text begins
    ids = pad(rows, "input_ids", padding(tokenizer), side="left").to(device)
    if decoding.no_repeat_ngram:
        ban = NoRepeatNgram(decoding.no_repeat_ngram, start=ids.shape[1])
        more["logits_processor"] = transformers.LogitsProcessorList([ban])
    generated = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=pad(rows, "attention_mask", 0, side="left").to(device),
        **(_search(decoding, tokenizer) | more),
    )
    return [text_of(text, tokenizer) for text in generated[:, ids.shape[1] :].tolist()]


def _decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    device: torch.device,
) -> list[str]:
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in prompts]
    given = _search(decoding, tokenizer)
    given["generation_config"].decoder_start_token_id = cast(
        Any, model
    ).config.decoder_start_token_id
    generated = cast(Any, model).generate(
        input_ids=pad(rows, "input_ids", padding(tokenizer)).to(device),
        attention_mask=pad(rows, "attention_mask", 0).to(device),
        **given,
    )
    return [text_of(ids, tokenizer) for ids in generated[:, 1:].tolist()]


def _search(decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes transformers' `generate` use our searches, which make beams themselves."""
    length, width = decoding.max_new_tokens, decoding.num_beams
    end = cast("int | None", tokenizer.eos_token_id)
    search = beams(length, end, width, decoding.length_penalty) if width > 1 else None
    return {
        "generation_config": settings(replace(decoding, num_beams=1), tokenizer),
        "custom_generate": search or greedy(length, end),
    }


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Generated tokens up to the end-of-text token, as a text."""
    end = tokenizer.eos_token_id
    kept = ids[: ids.index(end)] if end in ids else ids
    return cast(str, tokenizer.decode(kept, skip_special_tokens=True))


def settings(
    decoding: Decoding, tokenizer: PreTrainedTokenizerBase
) -> transformers.GenerationConfig:
    """The same, as transformers takes it."""
    more = {"length_penalty": decoding.length_penalty, "early_stopping": False}
    return transformers.GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=decoding.num_beams,
        use_cache=True,
        pad_token_id=padding(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        **(more if decoding.num_beams > 1 else {}),
    )


@contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """Takes the model's generation settings aside, which would fill in what ours leave open."""
    own: list[Any] = [m for m in model.modules() if "generation_config" in vars(m)]
    settings = [module.generation_config for module in own]
    for module in own:
        module.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for module, theirs in zip(own, settings):
            module.generation_config = theirs


def check_positions(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise a `UserError` if the model has not enough positions for a prompt and its answer."""
    limit, longest = learned_positions(model), max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise RecipeError(
            f"task.max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens, "
            f"but the model takes at most {limit} in all; lower it, or task.max_length"
        )
