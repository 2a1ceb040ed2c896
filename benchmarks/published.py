"""A round as the published scripts do it, as the baseline to measure against.

k + 1 copies of the model, every example padded to the maximum length, all copies' states written
anew in every round, the residual by dense products, and the same rows, batches and epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

from fedex_lora.engines.setup import Federation


class PublishedRound:
    """Call it for a round; built once from the same rows and settings as ours."""

    def __init__(self, federation: Federation, auto_model: Any, path: str) -> None:
        recipe, self.task = federation.recipe, federation.task
        lora = recipe.lora
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=lora.r,
            lora_alpha=int(lora.lora_alpha),
            target_modules=lora.target_modules,
        )
        base = auto_model.from_pretrained(path, **self.task.model_kwargs())
        self.server: Any = get_peft_model(base, config)
        self.clients: list[Any] = [copy.deepcopy(self.server) for _ in federation.clients]
        length, pad = recipe.task.max_length, federation.model.tokenizer.pad_token_id
        self.rows = [padded(rows, length, pad) for rows in federation.clients.values()]
        self.evaluation = padded(next(iter(federation.evaluation.values())), length, pad)
        self.training, self.scale = recipe.training, lora.lora_alpha / lora.r
        self.batch_size = recipe.evaluation.batch_size

    def __call__(self) -> float:
        self.round()
        return self.evaluate()

    def round(self) -> None:
        """All of it but the evaluation."""
        states = []
        for client, rows in zip(self.clients, self.rows):
            client.load_state_dict(self.server.state_dict())
            self.train(client, rows)
            states.append(client.state_dict())
        weights = [len(rows) / sum(map(len, self.rows)) for rows in self.rows]
        self.server.load_state_dict(self.aggregate(states, weights))

    def train(self, model: Any, rows: TensorDataset) -> None:
        model.train()
        epochs = int(self.training["num_train_epochs"])
        loader = DataLoader(rows, self.training["per_device_train_batch_size"], shuffle=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.training["learning_rate"])
        schedule = get_linear_schedule_with_warmup(optimizer, 0, epochs * len(loader))
        for _ in range(epochs):
            for ids, mask, labels in loader:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    def aggregate(
        self, states: list[Mapping[str, Tensor]], weights: list[float]
    ) -> dict[str, Tensor]:
        """FedAvg of everything, then mean of products minus product of means into the base."""
        mean = {
            k: sum((w * s[k] for w, s in zip(weights, states)), torch.zeros_like(v))
            if v.is_floating_point()
            else v
            for k, v in states[0].items()
        }
        for key in [k for k in mean if "lora_A" in k]:
            other = key.replace("lora_A", "lora_B")
            products = torch.stack([w * s[other] @ s[key] for w, s in zip(weights, states)])
            residual = products.sum(0) - mean[other] @ mean[key]
            mean[key.replace("lora_A.default", "base_layer")] += self.scale * residual
        return mean

    @torch.no_grad()
    def evaluate(self) -> float:
        self.server.eval()
        right = 0
        for ids, mask, labels in DataLoader(self.evaluation, self.batch_size):
            logits = self.server(input_ids=ids, attention_mask=mask).logits
            right += int((logits.argmax(-1) == labels).sum())
        return right / len(self.evaluation)


def padded(rows: Dataset, length: int, pad: int) -> TensorDataset:
    """Every row padded to `length`."""
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, one in enumerate(rows["input_ids"]):
        ids[i, : len(one)] = torch.tensor(one)
        mask[i, : len(one)] = 1
    return TensorDataset(ids, mask, torch.tensor(rows["labels"][:]))
