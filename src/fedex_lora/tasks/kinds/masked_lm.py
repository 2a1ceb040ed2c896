"""Masked language modelling of a text column: some tokens are hidden, and are to be found again.

So an encoder is pretrained further on the texts of a field, at institutions that keep them
(FedBERT). Of the tokens `mask_probability` are chosen anew for each batch; 80 % of these are
hidden, 10 % are others, 10 % stay (Devlin et al., arXiv 1810.04805). Rows that a model is scored on
are hidden once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from fedex_lora.errors import RecipeError, shown
from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks.base import (
    IGNORED,
    Batch,
    Collate,
    Prediction,
    Task,
    by_length,
    evaluating,
)
from fedex_lora.tasks.base import pad_inputs as padded
from fedex_lora.tasks.encoding import encode_texts, token_collator
from fedex_lora.tasks.kinds.causal_lm import check_texts
from fedex_lora.tasks.language import as_dataset
from fedex_lora.tasks.lazy import (
    Dataset,
    PreTrainedTokenizerBase,
    functional,
    nn,
    torch,
    transformers,
)
from fedex_lora.tasks.metrics import LOSS, PERPLEXITY, SHARE, perplexity
from fedex_lora.tasks.outputs import Outputs


class MaskedLM(TaskSpec):
    text_column: str = "text"
    mask_probability: float = Field(default=0.15, ge=0.01, lt=1)

    def build(self, labels: Sequence[str] | None) -> Task:
        return Task(
            name="masked-lm",
            auto_model="AutoModelForMaskedLM",
            peft_task_type=None,
            columns=(self.text_column,),
            evaluation_splits=("validation", "test"),
            primary="perplexity",
            metrics={"perplexity": PERPLEXITY, "accuracy": SHARE, "loss": LOSS},
            check=partial(check_texts, self.text_column),
            encode=partial(_encode, self.text_column),
            encode_evaluation=partial(_hidden, self.text_column, self.mask_probability),
            collator=partial(_collator, self.mask_probability),
            evaluate=_evaluate,
            prediction=Prediction(encode=partial(_masked, self.text_column), tell=_tell),
        )


register_task("masked-lm", MaskedLM)


def _encode(
    column: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Rows whose labels are their own tokens; which are hidden, the batch decides."""
    if tokenizer.mask_token_id is None:
        raise RecipeError(
            f"model.name: the tokenizer of {shown(tokenizer.name_or_path)} has no mask token; take "
            "a model that was pretrained so, e.g. BERT, or kind: causal-lm"
        )
    ids = encode_texts(rows[column][:], None, tokenizer, max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    encoded = [{"input_ids": row, "labels": row} for row in ids if set(row) - special]
    return as_dataset(encoded, len(rows), "text has no token but special ones")


def _hidden(
    column: str,
    probability: float,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Dataset:
    """The rows with tokens hidden once and for all: the same for every model and batch size."""
    collate = _collator(probability, tokenizer)
    encoded = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in _encode(column, rows, tokenizer, max_length).to_list():
            batch = collate([row])
            encoded.append({name: batch[name][0].tolist() for name in ("input_ids", "labels")})
    return as_dataset(encoded, len(encoded), "")


def _collator(probability: float, tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Hides tokens with the numbers that torch draws, as dropout does, at least one of a batch."""
    hide = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm=True, mlm_probability=probability
    )
    return partial(_batch, hide, tokenizer)


def _batch(hide: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Batch:
    if any(row["labels"] != row["input_ids"] for row in rows):  # hidden already
        return token_collator(tokenizer)(rows)
    batch = padded(rows, tokenizer)
    while True:
        ids, labels = hide.torch_mask_tokens(batch["input_ids"].clone())
        if (labels != IGNORED).any():  # the mean of no loss is no number
            return {**batch, "input_ids": ids, "labels": labels}


def _evaluate(
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """−log p of the tokens that were chosen, and the share of them that are found."""
    total, right, count = 0.0, 0, 0
    with evaluating(model) as device:
        for _, rows in by_length(encoded, batch_size):
            batch = {
                key: value.to(device) for key, value in token_collator(tokenizer)(rows).items()
            }
            labels = batch.pop("labels")
            chosen = labels != IGNORED
            logits, wanted = model(**batch).logits[chosen].float(), labels[chosen]
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
            right += int((logits.argmax(dim=-1) == wanted).sum())
            count += len(wanted)
    loss = total / count
    return {"perplexity": perplexity(loss), "accuracy": right / count, "loss": loss}


def _masked(
    column: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """The rows whose text has a mask token."""
    encoded = _encode(column, rows, tokenizer, max_length).select_columns(["input_ids", "labels"])
    there = [row for row in encoded.to_list() if tokenizer.mask_token_id in row["input_ids"]]
    reason = f"text has no {tokenizer.mask_token} within max_length ({max_length} tokens)"
    return as_dataset(there, len(rows), reason)


def _tell(
    model: nn.Module,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """For each mask the likeliest token, and the five likeliest with their probabilities."""
    answers: dict[int, dict[str, Any]] = {}
    with evaluating(model) as device:
        for indices, rows in by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in padded(rows, tokenizer).items()}
            logits = model(**batch).logits
            for i, one, ids in zip(indices, logits, batch["input_ids"]):
                likely = one[ids == tokenizer.mask_token_id].float().softmax(dim=-1).topk(5)
                pairs = zip(likely.indices.tolist(), likely.values.tolist())
                told = [
                    [
                        {"token": str(tokenizer.decode([t])).strip(), "probability": p}
                        for t, p in zip(*m)
                    ]
                    for m in pairs
                ]
                answers[i] = {"prediction": [m[0]["token"] for m in told], "likeliest": told}
    return [answers[i] for i in range(len(encoded))]
