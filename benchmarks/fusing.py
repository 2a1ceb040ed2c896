"""How much training k clients in one pass could gain: k steps of b rows against one of k·b rows.

An upper bound: per-client factors, heads, clipping and optimizers come on top of the one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.timing import in_turn
from fedex_lora.model.load import locate

CLIENTS = 3


def upper_bound(
    model: str,
    rows: int,
    tokens: int,
    repeats: int = 9,
    target: tuple[str, ...] = ("query", "value"),
) -> float:
    """Seconds of `CLIENTS` passes of `rows` rows over those of one pass of all, medians in turn."""
    base: Any = AutoModelForSequenceClassification.from_pretrained(locate(model), num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=list(target))
    adapted: Any = get_peft_model(base, lora).train()

    def step(count: int) -> None:
        ids = torch.randint(1000, 2000, (count, tokens))
        adapted(input_ids=ids, labels=torch.zeros(count, dtype=torch.long)).loss.backward()

    times = in_turn(
        {
            "apart": lambda: [step(rows) for _ in range(CLIENTS)],
            "fused": lambda: step(CLIENTS * rows),
        },
        repeats,
    )
    return times["apart"].median / times["fused"].median
