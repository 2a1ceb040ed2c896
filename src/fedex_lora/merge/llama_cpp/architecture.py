"""What llama.cpp calls the parts of a model, and how it wants them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from fedex_lora.errors import DataError

_KINDS = {  # by the class in transformers: the architecture, and whether rotary pairs are adjacent
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (gguf.MODEL_ARCH.QWEN3, False),
}
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Architecture:
    """A llama-like model.

    Attributes:
        name: llama.cpp's, e.g. `llama`.
        config: Of transformers.
        paired: Whether the two halves of a head's rows, which are rotated together, become pairs of
            rows: llama.cpp rotates neighbours there.
        names: llama.cpp's names of tensors by transformers'.
    """

    name: str
    config: Any
    paired: bool
    names: gguf.TensorNameMap

    def tensor(self, name: str) -> str:
        """llama.cpp's name of a model's tensor.

        Raises:
            UserError: It has none.
        """
        found = self.names.get_name(name, try_suffixes=_SUFFIXES)
        if found is None:
            raise DataError(
                f"{name}: llama.cpp has no name for it in a model of kind {self.name}, so that "
                "it cannot be written; leave it out of what is trained"
            )
        return found

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out × in), a bias or a factor B (out × r) with its rows in llama.cpp's order.

        Of a head with d rows, row i and row i + d/2 come to lie beside each other.
        """
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2], 0)
        if not self.paired or not heads:
            return weight
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)


def architecture(config: Any) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        UserError: It is none that is known here.
    """
    kind = (config.architectures or ["a model of no named kind"])[0]
    if kind not in _KINDS:
        raise DataError(
            f"{kind}: GGUF is written of {', '.join(_KINDS)}; for others llama.cpp has "
            "convert_hf_to_gguf.py and convert_lora_to_gguf.py, which read what "
            "`fedex-lora export` writes"
        )
    arch, paired = _KINDS[kind]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    return Architecture(gguf.MODEL_ARCH_NAMES[arch], config, paired, names)


def describe(writer: gguf.GGUFWriter, architecture: Architecture, name: str) -> Tensor | None:
    """Writes what a model's file says of its shape.

    Returns:
        Factors of the rotary frequencies (d/2), where the model has such.

    Raises:
        UserError: It scales its rotary frequencies in a way that is not known here.
    """
    config = architecture.config
    size, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or size // heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        return _llama3(rope, head)
    elif kind != "default":
        raise DataError(
            f"rope_parameters: {kind} is not written here; llama.cpp's own convert_hf_to_gguf.py "
            "may know it"
        )
    return None


def _llama3(rope: dict[str, Any], head: int) -> Tensor:
    """By how much Llama 3.1 divides each frequency: 1 for short waves, `factor` for long ones."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = old * frequencies / (2 * math.pi)  # within the length it was trained for
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
