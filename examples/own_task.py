"""A task and a metric of one's own: finding the names in notes, by the share that is missed."""

import sys
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizer, set_seed

from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import Metric, Task, TaskSpec, base, register_task


class Names(TaskSpec):
    mark: str = "*"  # a key of the block in recipes: what names end with in the data

    def build(self, labels):
        def encode(rows, tokenizer, max_length):
            notes = [text.split()[: max_length - 2] for text in rows["text"]]
            inputs = tokenizer([" ".join(note).replace(self.mark, "") for note in notes])
            named = [[0, *(int(word.endswith(self.mark)) for word in n), 0] for n in notes]
            return rows.from_dict({**inputs, "labels": named})  # 0: also [CLS] and [SEP]

        return Task(
            name="names", auto_model="AutoModelForTokenClassification", peft_task_type="TOKEN_CLS",
            columns=("text",), evaluation_splits=("validation",), labels=("other", "name"),
            primary="missed", metrics={"missed": Metric(higher_is_better=False, range=(0, 1))},
            check=lambda rows, where, line_of: base.check_columns(rows, ["text"], where),
            encode=encode, evaluate=evaluate, collator=lambda tok: lambda rows: collate(rows, tok),
        )  # fmt: skip


def collate(rows, tokenizer):  # -100: what losses pass over
    return {**base.pad_inputs(rows, tokenizer), "labels": base.pad(rows, "labels", -100)}


def evaluate(model, encoded, tokenizer, batch_size, outputs=None):
    found = []  # whether each name was taken for one
    with base.evaluating(model) as device:
        for _, rows in base.by_length(encoded, batch_size):
            batch = {key: value.to(device) for key, value in collate(rows, tokenizer).items()}
            names = batch.pop("labels") == 1
            found += model(**batch).logits.argmax(-1)[names].tolist()
    return {"missed": 1 - sum(found) / len(found), "names": len(found)}


register_task("names", Names)
set_seed(0)
folder, people = Path(sys.argv[1]), ["ada", "bela", "chen", "dora"]
notes = [f"today {a}* saw {b}* again" for a in people for b in people]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *people, "today", "saw", "again"]
BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder / "model")
config = BertConfig(vocab_size=len(words), hidden_size=12, num_hidden_layers=1)
BertModel(config).save_pretrained(folder / "model")
for split, part in {"train": notes[:12], "validation": notes[12:]}.items():
    (folder / f"{split}.csv").write_text("\n".join(["text", *part]))
blocks = {"model": {"name": str(folder / "model")}, "lora": {"target_modules": ["query", "value"]}}
blocks |= {"task": {"kind": "names", "mark": "*"}, "data": {"path": str(folder)}}
blocks |= {"federation": {"clients": 2, "rounds": 3}, "training": {"learning_rate": 0.05}}
print(start_run(Recipe(name="names", **blocks), folder / "run")["best"])
