"""Tiny models of real architectures with a real tokenizer, built from configs, not downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PreTrainedTokenizerFast

from fedex_lora.model.load import with_padding

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "A file is opened for reading and its lines are returned one by one.",
    "Sockets send bytes over the network; threads wait for locks.",
    "Numbers, dates and times are compared, added and rounded.",
]
ENCODERS = ("roberta", "bert", "mpnet")
VISION = ("vit",)
DECODERS = ("gpt2", "llama", "mistral", "gemma2")
BOTH = ("t5", "bart")
SEEING = ("llava",)  # which answer questions about images
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'image' %}"
    "<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny(
    kind: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    num_labels: int = 3,
    auto: str | None = None,
    **overrides: Any,
) -> Path:
    """Saves a tiny pretrained model and tokenizer (image processor) to `path`.

    Encoders have no head unless `auto` names a class with one; decoders are causal language models,
    T5 and BART have both. GPT-2 and
    Gemma-2 have tied embeddings; GPT-2, Llama and Mistral have no padding token, as in real life.
    `overrides` are fields of the model's config.
    """
    encoder = kind in (*ENCODERS, *VISION)
    framed = (*ENCODERS, *BOTH)
    tokenizer = _tokenizer(pad=kind in (*framed, *SEEING, "gemma2"), cls=kind in framed)
    if kind in SEEING:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = _config(kind, len(tokenizer), tokenizer)
        config.update({"num_labels": num_labels, **overrides})
        usual = "AutoModel" if encoder else "AutoModelForCausalLM"
        usual = "AutoModelForSeq2SeqLM" if kind in BOTH else usual
        usual = "AutoModelForImageTextToText" if kind in SEEING else usual
        model = getattr(transformers, auto or usual).from_config(config)
        for parameter in model.parameters():  # norms and biases away from ones and zeros
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path)
    if kind in VISION:
        size = {"height": config.image_size, "width": config.image_size}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(path)
    elif kind in SEEING:
        pixels = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
        transformers.LlavaProcessor(
            image_processor=pixels,
            tokenizer=tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT,
        ).save_pretrained(path)
    else:
        tokenizer.save_pretrained(path)
    return path


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """A folder's tokenizer as tasks get it: with a padding token."""
    return with_padding(transformers.AutoTokenizer.from_pretrained(str(folder)))


def _tokenizer(*, pad: bool, cls: bool) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(TEXT, vocab_size=320, special_tokens=special, show_progress=False)
    if cls:
        bpe._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        mask_token="<mask>" if cls else None,
        model_max_length=128,
    )


def _config(
    kind: str, vocab: int, tokenizer: PreTrainedTokenizerFast
) -> transformers.PreTrainedConfig:
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    size = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    wide = {**size, "intermediate_size": 24, **ids}
    grouped = {**wide, "num_key_value_heads": 2, "max_position_embeddings": 160}
    match kind:
        case "roberta":
            return transformers.RobertaConfig(
                **wide, max_position_embeddings=160, type_vocab_size=1
            )
        case "bert":
            return transformers.BertConfig(**wide, max_position_embeddings=160)
        case "mpnet":
            return transformers.MPNetConfig(**wide, max_position_embeddings=160)
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=vocab, n_embd=16, n_layer=2, n_head=4, n_positions=160, **ids
            )
        case "llama":
            return transformers.LlamaConfig(**grouped, tie_word_embeddings=False)
        case "mistral":
            return transformers.MistralConfig(**grouped, sliding_window=32)
        case "gemma2":
            return transformers.Gemma2Config(**grouped, head_dim=6, query_pre_attn_scalar=6)
        case "t5":
            both = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            return transformers.T5Config(
                vocab_size=vocab, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, **both
            )
        case "bart":
            sides = {f"{s}_layers": 2 for s in ("encoder", "decoder")}
            sides |= {f"{s}_attention_heads": 4 for s in ("encoder", "decoder")}
            sides |= {f"{s}_ffn_dim": 24 for s in ("encoder", "decoder")}
            return transformers.BartConfig(
                vocab_size=vocab,
                d_model=16,
                max_position_embeddings=160,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                **sides,
                **ids,
            )
        case "llava":
            vision = transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
            )
            return transformers.LlavaConfig(
                vision_config=vision,
                text_config=_config("llama", vocab, tokenizer),
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                image_seq_length=4,
                vision_feature_layer=-1,
            )
        case "vit":
            return transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=24,
                image_size=16,
                patch_size=4,
            )
    raise ValueError(f"no tiny {kind!r}; there are {ENCODERS + DECODERS + BOTH + VISION + SEEING}")
