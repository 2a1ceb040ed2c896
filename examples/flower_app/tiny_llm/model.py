"""A Llama of a few thousand weights that reads bytes, and made-up rows for every client."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ROWS = [
    ["the patient sleeps well", "the patient eats little", "the patient feels pain"],
    ["the loan is paid", "the loan is due in may"],
    ["rain in the north", "wind from the west", "sun in the south", "snow in the hills"],
]


def get_model() -> PeftModel:
    """The pretrained weights are the same everywhere, as if they came from a hub."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def loss_on(model: PeftModel, rows: list[str]) -> torch.Tensor:
    """The mean over rows of a row's loss."""
    batches = [torch.tensor([list(row.encode())]) for row in rows]
    return torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).mean()
