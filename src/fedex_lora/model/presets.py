"""Sizes of the paper's models, so that what they cost can be told offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The sizes in a public model's config.json.

    Attributes:
        ids: Its names on the hub.
        kind: transformers' `model_type`.
        made_for: The class that its weights were published for.
        head_dim, kv_heads, intermediate: None where the architecture settles them.
    """

    ids: tuple[str, ...]
    kind: str
    made_for: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    positions: int
    intermediate: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = True

    def fields(self) -> dict[str, Any]:
        """The same under the names that transformers' configs take."""
        known = {
            "architectures": [self.made_for],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "type_vocab_size": 1 if self.kind == "roberta" else None,
        }
        return {name: value for name, value in known.items() if value is not None}


# ids, kind, made for; vocabulary, hidden, layers, heads, positions, intermediate, heads of keys
_MISTRAL = (4096, 32, 32, 32768, 14336, 8)

PRESETS: dict[str, Preset] = {
    "roberta-base": Preset(
        ("FacebookAI/roberta-base",), "roberta", "RobertaForMaskedLM", 50265, 768, 12, 12, 514, 3072
    ),
    "roberta-large": Preset(
        ("FacebookAI/roberta-large",),
        *("roberta", "RobertaForMaskedLM"),
        *(50265, 1024, 24, 16, 514, 4096),
    ),
    "gpt2": Preset(("openai-community/gpt2",), "gpt2", "GPT2LMHeadModel", 50257, 768, 12, 12, 1024),
    "llama-3.2-3b": Preset(
        ("meta-llama/Llama-3.2-3B",),
        *("llama", "LlamaForCausalLM"),
        *(128256, 3072, 28, 24, 131072, 8192, 8),
        head_dim=128,
    ),
    "mistral-7b-v0.1": Preset(
        ("mistralai/Mistral-7B-v0.1",),
        "mistral",
        "MistralForCausalLM",
        32000,
        *_MISTRAL,
        tied=False,
    ),
    "mistral-7b-v0.3": Preset(
        ("mistralai/Mistral-7B-v0.3",),
        "mistral",
        "MistralForCausalLM",
        32768,
        *_MISTRAL,
        tied=False,
    ),
    "gemma-2-9b": Preset(
        ("google/gemma-2-9b",),
        *("gemma2", "Gemma2ForCausalLM"),
        *(256000, 3584, 42, 16, 8192, 14336, 8),
        head_dim=256,
    ),
}


def preset_of(name: str) -> Preset | None:
    """The preset of that name or hub id, in any case; None if there is none.

    Example:
        >>> preset_of("facebookai/RoBERTa-large") is PRESETS["roberta-large"], preset_of("x")
        (True, None)
    """
    found = [p for key, p in PRESETS.items() if name.lower() in (key, *map(str.lower, p.ids))]
    return found[0] if found else None
