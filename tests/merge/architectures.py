"""Tiny models of architectures whose tensors have other names on disk than in the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
INPUTS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def build(kind: str, **text: Any) -> Any:
    """A random model of that architecture, with its usual class for language.

    Args:
        text: Further fields of the (text) config.
    """
    t, of_text = transformers, _TEXT | text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        match kind:
            case "llama":
                model = t.LlamaForCausalLM(t.LlamaConfig(**of_text))
            case "llava":
                vision = t.CLIPVisionConfig(**_VISION).to_dict()
                words = t.LlamaConfig(**of_text).to_dict()
                config = t.LlavaConfig(text_config=words, vision_config=vision)
                model = t.LlavaForConditionalGeneration(config)
            case "qwen2_vl":
                vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 4}
                vision |= {"patch_size": 4, "mlp_ratio": 2}
                words = of_text | {"rope_parameters": _ROPE}
                config = t.Qwen2VLConfig(text_config=words, vision_config=vision)
                model = t.Qwen2VLForConditionalGeneration(config)
            case "gemma3":
                words = of_text | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 16}
                config = t.Gemma3Config(
                    text_config=words, vision_config=_VISION, mm_tokens_per_image=4
                )
                model = t.Gemma3ForConditionalGeneration(config)
            case "mixtral":
                config = t.MixtralConfig(**of_text, num_local_experts=4, num_experts_per_tok=2)
                model = t.MixtralForCausalLM(config)
            case "qwen3_moe":
                config = t.Qwen3MoeConfig(
                    **of_text, **_EXPERTS, num_experts=4, moe_intermediate_size=12
                )
                model = t.Qwen3MoeForCausalLM(config)
            case "gpt_oss":
                config = t.GptOssConfig(**of_text, **_EXPERTS, num_local_experts=4, pad_token_id=1)
                model = t.GptOssForCausalLM(config)
            case "granitemoe":
                config = t.GraniteMoeConfig(**of_text, num_local_experts=4, num_experts_per_tok=2)
                model = t.GraniteMoeForCausalLM(config)
            case "qwen3_vl_moe":
                vision = {"depth": 1, "hidden_size": 16, "num_heads": 4, "patch_size": 4}
                vision |= {"intermediate_size": 24, "out_hidden_size": 16}
                vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
                words = of_text | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12}
                words |= {"rope_parameters": _ROPE | {"mrope_interleaved": True}}
                config = t.Qwen3VLMoeConfig(text_config=words, vision_config=vision)
                model = t.Qwen3VLMoeForConditionalGeneration(config)
            case "nomic_bert":
                encoder = {k: v for k, v in of_text.items() if k != "num_key_value_heads"}
                model = t.NomicBertForMaskedLM(t.NomicBertConfig(**encoder))
            case _:
                raise ValueError(f"no tiny {kind!r}")
        for parameter in model.parameters():  # norms and biases away from ones and zeros
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def logits(model: Any, inputs: Tensor = INPUTS) -> Tensor:
    """In float32: stacked experts are multiplied in no wider one."""
    with torch.no_grad():
        return model.float().eval()(input_ids=inputs).logits


def reload(model: Any, folder: Path, **options: Any) -> Any:
    """Another model of the same class, from files that have all of its weights."""
    cls = type(model)
    loaded, told = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    return loaded


def off(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return ((got - expected).norm() / expected.norm()).item()


def mean_of(states: list[Mapping[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Σ wᵢ·xᵢ / Σ wᵢ in float64, as float32."""
    shares = [w / sum(weights) for w in weights]
    return {
        key: sum(w * state[key].double() for w, state in zip(shares, states)).float()  # type: ignore[union-attr]
        for key in states[0]
    }
