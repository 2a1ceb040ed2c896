"""What all peers share: the federation, a turn of the plain Trainer, and what a mean should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Trainer, TrainingArguments

from benchmarks.rounds import MINILM, recipe
from fedex_lora.engines.setup import Federation, set_up
from fedex_lora.model.load import locate
from fedex_lora.recipe import Recipe

Weights = Mapping[str, Tensor]
"""The effective weights of the adapted layers by name, out × in, float64."""


@dataclass(frozen=True)
class Asked:
    """What a peer is to do.

    Attributes:
        rounds: How many.
        chorus: Where the package of that name lies.
    """

    data: Path
    threads: int
    rounds: int
    chorus: Path | None = None

    def recipe(self, **engine: Any) -> Recipe:
        """MiniLM on mrpc: 3 clients, one local epoch in batches of 16."""
        spec = recipe("mrpc", self.data).with_engine(**engine)
        rounds = spec.federation.model_copy(update={"rounds": self.rounds})
        return spec.model_copy(update={"federation": rounds})

    def federation(self) -> Federation:
        """With rows that are dealt out and encoded, for float32 and one client after the other."""
        torch.set_num_threads(self.threads)
        return set_up(self.recipe(precision="float32", fuse=1))


@dataclass(frozen=True)
class Ended:
    """A round: where it began, where the clients ended, their rows, and what came of it."""

    start: Weights
    ends: Sequence[Weights]
    rows: Sequence[int]
    got: Mapping[str, Weights]

    def wrong(self) -> dict[str, float]:
        """‖got − Σ wᵢ·endᵢ‖ / ‖Σ wᵢ·endᵢ − start‖ over all adapted layers, by name of `got`."""
        total = sum(self.rows)
        ideal = {
            name: sum((n / total * end[name] for n, end in zip(self.rows, self.ends)), 0 * w)
            for name, w in self.start.items()
        }
        return {what: _far(got, ideal) / _far(ideal, self.start) for what, got in self.got.items()}


def _far(a: Weights, b: Weights) -> float:
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


def serve(connection: Connection, rounds: Iterable[Ended]) -> None:
    """Does a round when asked to, and then says how wrong it was, which takes its time too."""
    each = iter(rounds)
    connection.send("ready")
    while connection.recv() == "round":
        ended = next(each)
        connection.send("done")
        connection.recv()
        connection.send(ended.wrong())


def base_model(federation: Federation) -> Any:
    """The pretrained model, read anew, with its head."""
    kwargs = federation.task.model_kwargs()
    auto: Any = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(locate(MINILM), **kwargs)


def adapted(federation: Federation) -> PeftModel:
    """The pretrained model with the adapter of the recipe, by plain PEFT."""
    lora = federation.recipe.lora
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.r,
        lora_alpha=int(lora.lora_alpha),
        target_modules=lora.target_modules,
    )
    model = get_peft_model(base_model(federation), config)
    assert isinstance(model, PeftModel)
    return model


def scale(federation: Federation) -> float:
    """What PEFT multiplies B·A with."""
    lora = federation.recipe.lora
    return lora.lora_alpha / lora.r


def train(model: Any, rows: Dataset, federation: Federation, padding: Any = True) -> None:
    """A turn of the plain Trainer.

    Args:
        padding: Of a batch, as tokenizers call it: True is to the longest row.
    """
    tokenizer, length = federation.model.tokenizer, federation.recipe.task.max_length

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [{"input_ids": row["input_ids"]} for row in rows]
        batch = tokenizer.pad(ids, padding=padding, max_length=length, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            **federation.recipe.training,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, data_collator=collate, train_dataset=rows).train()


def effective(base: Weights, state: Mapping[str, Tensor], scale: float) -> Weights:
    """base + s·B·A of every adapted layer; `state` holds the factors under PEFT's names."""
    found = {}
    for key in state:
        name, is_a, _ = key.replace(".default", "").partition(".lora_A.weight")
        if is_a:
            product = state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
            name = name.removeprefix("base_model.model.")
            found[name] = base[name] + scale * product
    return found


def bases(module: Any) -> Weights:
    """The frozen weights below the adapted layers of a PEFT model, as they are now."""
    return {
        name.removeprefix("base_model.model."): cast(Tensor, layer.get_base_layer().weight)
        .detach()
        .double()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }
