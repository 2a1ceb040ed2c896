"""A method of one's own: FedSA-LoRA (Guo et al., arXiv 2410.01463).

A holds what clients have in common and is averaged; B is a client's own and never leaves it. (The
package has it too, as `fedsa`; this is how a method comes in from outside.)
"""

import sys
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizer, set_seed

from fedex_lora.aggregation.assignment import Assigned, Assignment
from fedex_lora.aggregation.methods import Method, register_method
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import start_run


class SharedA(Assignment):
    name = "A averaged, B kept"
    shared, own, private = frozenset("A"), frozenset("B"), True

    def assign(self, s):  # of one layer: Ā is all the server has; what B does it cannot know
        return Assigned(s.moved)


register_method("own-fedsa", Method("both", SharedA(), "dropped", "Guo et al., arXiv 2410.01463"))

# clients that disagree: the same notes, which for one are good and for the other bad news
set_seed(0)
folder, goods = Path(sys.argv[1]), ["oil", "corn", "tin", "wool", "tea", "rice"]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *goods, "gets", "dearer", "cheaper"]
BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder / "model")
config = BertConfig(
    vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2
)
BertModel(config).save_pretrained(folder / "model")
for client, good in {"seller": "dearer", "buyer": "cheaper"}.items():
    notes = [(f"{a} gets {move}", move) for a in goods for move in ("dearer", "cheaper")]
    rows = [f"{text},{'good' if move == good else 'bad'}" for text, move in notes * 4]
    (folder / f"{client}.csv").write_text("\n".join(["text,label", *rows]))
blocks = {"model": {"name": str(folder / "model")}, "evaluation": {"where": "clients"}}
blocks |= {"task": {"kind": "text-classification", "labels": ["bad", "good"]}}
blocks |= {"data": {"clients": [str(folder / f"{c}.csv") for c in ("buyer", "seller")]}}
blocks |= {"federation": {"clients": 2, "rounds": 4}}
blocks |= {"training": {"learning_rate": 0.02, "num_train_epochs": 5}}
blocks |= {"lora": {"target_modules": ["query", "value", "dense"], "r": 4}}
for method in ("fedit", "own-fedsa"):
    recipe = Recipe(name=method, method={"name": method}, **blocks)
    print(method, start_run(recipe, folder / method)["best"]["client_scores"])
