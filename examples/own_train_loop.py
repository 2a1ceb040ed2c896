"""A training loop of one's own, clipped and noised before it is sent, on a tiny model."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, set_seed

import fedex_lora as fl

set_seed(0)
folder, good, bad = Path(sys.argv[1]), ["fine", "warm", "kind"], ["poor", "cold", "rude"]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "day", "word", *good, *bad]
BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder / "model")
sizes = {"vocab_size": len(words), "hidden_size": 24, "num_hidden_layers": 1, "num_labels": 2}
config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BertForSequenceClassification(config).save_pretrained(folder / "model")
lora = LoraConfig(r=2, target_modules="all-linear")
model = fl.Model.from_pretrained(str(folder / "model"), lora, num_labels=2)


def train(module, rows, *, round, client, rng):
    """Sixty steps on three rows each; `module` is a plain torch module with LoRA in it."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.003)
    losses = []
    for _ in range(60):
        some = rows[torch.randperm(len(rows), generator=rng)[:3].tolist()]
        batch = {name: torch.tensor(some[name]) for name in ("input_ids", "labels")}
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return fl.Trained({"loss": sum(losses) / len(losses), "best": min(losses)})


def client(adjectives):
    texts = [f"a {x} {noun}" for x in adjectives for noun in ("day", "word")]
    rows = {"input_ids": model.tokenizer(texts)["input_ids"]}
    return Dataset.from_dict({**rows, "labels": [int(t.split()[1] in good) for t in texts]})


clients = {"ann": client(["fine", "poor"]), "bob": client(["warm", "cold", "kind", "rude"])}
noised = fl.chain(fl.clip(5.0), fl.gaussian_noise(1e-4))
federation = fl.Federation(model, clients, method="fedex", train=train, transform=noised)
for round in federation.rounds(4):
    print(round.number, {name: told["loss"] for name, told in round.metrics.items()})
print(federation.evaluate(client([*good, *bad])))
