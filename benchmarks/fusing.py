"""How much training k clients in one pass could gain: k steps of b rows against one of k·b rows.

An upper bound: per-client factors, heads, clipping and optimizers come on top of the one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.results import Figure, Row
from benchmarks.rounds import MINILM
from benchmarks.timing import in_turn, ratio
from fedex_lora.model.load import locate

CLIENTS = 3


def upper_bound(
    model: str,
    rows: int,
    tokens: int,
    repeats: int = 9,
    target: tuple[str, ...] = ("query", "value"),
) -> tuple[float, float | None]:
    """Seconds of `CLIENTS` passes of `rows` rows over those of one pass of all, in turn."""
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
    return ratio(times["apart"], times["fused"])


def row(model: str = MINILM, repeats: int = 9) -> Row:
    """The bound for small batches, where fusing could gain most."""
    sizes = [(1, 16), (1, 64), (4, 16), (4, 64), (16, 16), (16, 64)]
    return Row(
        f"Fused clients: {CLIENTS} clients' batches in one pass against one after the other",
        [
            Figure(f"at most: {r} rows of {t} tokens each", *_bound(model, r, t, repeats))
            for r, t in sizes
        ],
        [
            "MiniLM, rank 4, forward and backward. An upper bound: in the one pass all clients "
            "share factors and head; their own ones, clipping and optimizers come on top."
        ],
    )


def _bound(model: str, rows: int, tokens: int, repeats: int) -> tuple[float, str, float | None]:
    value, spread = upper_bound(model, rows, tokens, repeats)
    return value, "×", spread
