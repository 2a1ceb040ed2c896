"""Language modelling of a text column: the loss is over all tokens, cut at `max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fedex_lora.errors import DataError, shown
from fedex_lora.recipe import TaskSpec, register_task
from fedex_lora.tasks.base import LineOf, Task, check_columns, one_based
from fedex_lora.tasks.encoding import encode_texts
from fedex_lora.tasks.language import as_dataset, evaluate_loss, language_task
from fedex_lora.tasks.lazy import Dataset, PreTrainedTokenizerBase


class CausalLM(TaskSpec):
    text_column: str = "text"
    packing: bool = False  # training batches without padding: rows in one sequence

    def build(self, labels: Sequence[str] | None) -> Task:
        return language_task(
            "causal-lm",
            (self.text_column,),
            check=partial(check_texts, self.text_column),
            encode=partial(_encode, self.text_column),
            evaluate=evaluate_loss,
            packing=self.packing,
        )


register_task("causal-lm", CausalLM)


def check_texts(column: str, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    check_columns(rows, (column,), where, ("text_column",))
    for row, text in enumerate(rows[column]):
        if not isinstance(text, str) or not text.strip():
            found = (
                "missing" if text is None else f"{shown(text)}; expected a text that is not empty"
            )
            raise DataError(f"{where}, line {line_of(row)}: {column} is {found}.")


def _encode(
    column: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    encoding = encode_texts(rows[column][:], None, tokenizer, max_length)
    encoded = [{"input_ids": ids, "labels": ids} for ids in encoding["input_ids"] if len(ids) > 1]
    return as_dataset(encoded, len(rows), "text has a single token, so that nothing is predicted")
