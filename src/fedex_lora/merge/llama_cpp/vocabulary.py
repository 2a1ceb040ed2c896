"""A model's tokenizer as llama.cpp wants it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import gguf.vocab

from fedex_lora.disk import parsed, reason
from fedex_lora.errors import DataError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # what llama.cpp calls the way of cutting texts into words
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int, pre: str | None) -> None:
    """Writes the tokens, their kinds, merges and special tokens.

    Args:
        folder: Of a model, with tokenizer.json.
        size: Rows of the embedding; those without a token get an unused one.
        pre: llama.cpp's name of the way in which texts are cut; told from the tokenizer by default.

    Raises:
        UserError: There is no such tokenizer, or llama.cpp's name of its way is not known here.
    """
    try:
        known = parsed((folder / "tokenizer.json").read_bytes())
        model = known["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'tokenizer.json'}: no tokenizer: {reason(error)}; a model in GGUF brings "
            "its own"
        ) from None
    if model.get("type") != "BPE":
        raise DataError(f"{folder}: a tokenizer of kind {model.get('type')}; expected BPE")
    if model.get("byte_fallback"):
        _pieces(writer, folder, size)
    else:
        _bytes(writer, known, size, pre or _way(known, folder))
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


def _pieces(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Of SentencePiece's kind: pieces with scores, bytes as tokens of their own."""
    found = list(gguf.vocab.LlamaHfVocab(folder).all_tokens())
    found += [
        (f"[PAD{i}]".encode(), -1000.0, gguf.TokenType.UNUSED) for i in range(len(found), size)
    ]
    tokens, scores, kinds = zip(*found, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))


def _bytes(writer: gguf.GGUFWriter, known: dict[str, Any], size: int, pre: str) -> None:
    """Of GPT-2's kind: texts as bytes, merged."""
    names = {number: token for token, number in known["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for one in known.get("added_tokens", []):
        names[one["id"]] = one["content"]
        control = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        kinds[one["id"]] = control
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(size)])


def _way(known: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how this tokenizer cuts texts into words."""
    part = known.get("pre_tokenizer") or {}
    parts = part.get("pretokenizers", [part])
    splits = [p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"]
    if not splits and any(p.get("type") == "ByteLevel" and p.get("use_regex", True) for p in parts):
        return "gpt-2"
    if len(splits) == 1 and splits[0] in _SPLITS:
        return _SPLITS[splits[0]]
    raise DataError(
        f"{folder / 'tokenizer.json'}: cuts texts by {json.dumps(splits)[:200]}, for which "
        "llama.cpp's name is not known here; give it with `pre` (see its convert_hf_to_gguf.py, "
        "get_vocab_base_pre)"
    )
