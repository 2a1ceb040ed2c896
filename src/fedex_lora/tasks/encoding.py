"""Texts as tokens: what all tasks with texts share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from fedex_lora.errors import RecipeError
from fedex_lora.tasks.base import IGNORED, Batch, Collate, pad, pad_inputs
from fedex_lora.tasks.lazy import PreTrainedTokenizerBase, torch

CHARACTERS = 2**17  # of a text that are tokenised in any case

logger = logging.getLogger(__name__)


def encode_texts(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list[list[int]]]:
    """The tokenizer's columns for texts or pairs of texts, cut at `max_length` tokens.

    A special token that the tokenizer puts around a text, and that a chat template has written
    there already, stands there once; a warning says so.
    """
    firsts = shortened(texts, tokenizer, max_length)
    seconds = None if pairs is None else shortened(pairs, tokenizer, max_length)
    encoding = dict(tokenizer(firsts, seconds, truncation=True, max_length=max_length))
    ids = cast(list[list[int]], encoding["input_ids"])
    twice = _begun_twice(firsts, ids, tokenizer)
    kept = [slice(int(first), len(row)) for first, row in zip(twice, ids)]
    ends = _specials(tokenizer, "eos_token", "sep_token")
    for i, text in enumerate(firsts if seconds is None else seconds):
        if any(text.endswith(end) and ids[i][-2:] == [number] * 2 for end, number in ends):
            kept[i], twice[i] = slice(kept[i].start, len(ids[i]) - 1), True
    _say(sum(twice), len(texts))
    return {k: [row[part] for row, part in zip(rows, kept)] for k, rows in encoding.items()}


def encode_pairs(
    prompts: Sequence[str],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt and of its response, which ends with the end-of-text token.

    Special tokens that the tokenizer puts before a text stand before the prompt; the end-of-text
    token that some append to it is taken off, as the response is still to come. Those that a chat
    template has written already stand there once, with a warning. Nothing is cut at `max_length`,
    but texts that are much longer are `shortened`.

    Raises:
        UserError: The tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RecipeError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token, which is "
            "needed to end a response; add an eos_token to its configuration."
        )
    prompts = shortened(prompts, tokenizer, max_length)
    responses = shortened(bare_responses(responses, tokenizer), tokenizer, max_length)
    asked = tokenizer(prompts, verbose=False)["input_ids"]  # silent on what is too long
    answered = tokenizer(responses, add_special_tokens=False, verbose=False)["input_ids"]
    twice = _begun_twice(prompts, cast(list[list[int]], asked), tokenizer)
    _say(sum(twice), len(prompts))
    asked = [ids[int(first) :] for first, ids in zip(twice, asked)]
    asked = [ids[:-1] if ids and ids[-1] == end else ids for ids in asked]
    return [(prompt, [*response, cast(int, end)]) for prompt, response in zip(asked, answered)]


def bare_responses(responses: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses without the special tokens that a chat template has written around them."""
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    bare = []
    for response in responses:
        text = response.removeprefix(begin) if isinstance(begin, str) else response
        if isinstance(end, str) and text.rstrip().endswith(end):
            text = text.rstrip().removesuffix(end)
        bare.append(text)
    _say(sum(a != b for a, b in zip(bare, responses)), len(bare))
    return bare


def shortened(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[str]:
    """Texts without what cannot be among their first `max_length` tokens, with a warning.

    Tokenising 10 MB takes seconds, wherever it is cut afterwards. Texts of up to `CHARACTERS`
    are left alone.
    """
    if max(map(len, texts), default=0) <= CHARACTERS:
        return list(texts)
    longest = max(CHARACTERS, max_length * max(map(len, tokenizer.get_vocab())))
    long = sum(len(text) > longest for text in texts)
    if long:
        logger.warning(
            "%d of %d texts are longer than %d characters and cut there", long, len(texts), longest
        )
    return [text[:longest] for text in texts]


def labelled(prompt: list[int], response: list[int], max_length: int) -> dict[str, Any]:
    """Both as one row, cut at `max_length`; only the response's tokens are predicted."""
    ids = [*prompt, *response][:max_length]
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


def row_collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Batches of rows with a label each."""
    return partial(_of_rows, tokenizer)


def token_collator(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Batches of rows with a label for each token."""
    return partial(_of_tokens, tokenizer)


def _of_rows(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Batch:
    labels = torch.tensor([row["labels"] for row in rows])
    return {**pad_inputs(rows, tokenizer), "labels": labels}


def _of_tokens(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Batch:
    return {**pad_inputs(rows, tokenizer), "labels": pad(rows, "labels", IGNORED)}


def _begun_twice(
    texts: Sequence[str], ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Whether the special token that begins a text was put before it once more."""
    tokens = _specials(tokenizer, "bos_token", "cls_token")
    return [
        any(text.startswith(begin) and row[:2] == [number] * 2 for begin, number in tokens)
        for text, row in zip(texts, ids)
    ]


def _specials(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[tuple[str, int]]:
    """Those special tokens that the tokenizer has, as texts and as numbers."""
    pairs = [(getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) for name in names]
    return [(str(text), number) for text, number in pairs if text]


def _say(count: int, of: int) -> None:
    if count:
        logger.warning(
            "%d of %d texts have the tokenizer's special tokens around them already, as a chat "
            "template writes them: these are not put there once more",
            count,
            of,
        )
