"""A transport of one's own, which logs what clients send, and a training loop of one's own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import fedex_lora as fl
from fedex_lora.recipe import Recipe
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.run import start_run


class Logged:
    """Another transport's rounds; every reply is a line of a file before it counts."""

    def __init__(self, inner, log):
        self.inner, self.log = inner, log

    def __getattr__(self, name):  # evaluate, stage, examples, validation, newcomers
        return getattr(self.inner, name)

    settings = property(
        lambda self: self.inner.settings, lambda self, new: setattr(self.inner, "settings", new)
    )

    def train(self, exchange):
        for reply in self.inner.train(exchange):
            told = {"round": exchange.round, "client": reply.client, "reply": type(reply).__name__}
            with self.log.open("a") as lines:
                lines.write(json.dumps(told) + "\n")
            yield reply


def logged(recipe, out, clients, watcher):
    federation, local = in_this_process(recipe.with_engine(kind="local"), out, clients, watcher)
    named = federation.recipe.with_engine(kind=recipe.engine.kind)
    return replace(federation, recipe=named), Logged(local, Path(f"{out}.log"))


def plain_sgd(module, rows, *, round, client, rng):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for i in torch.randperm(len(rows), generator=rng).tolist():
        module(**{name: torch.tensor([value]) for name, value in rows[i].items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return fl.Trained({"steps": len(rows)})


fl.register_transport("logged", logged)
fl.register_train("plain-sgd", plain_sgd)
if __name__ == "__main__":  # `fedex-lora run` knows both where a package names them
    recipe = Recipe.model_validate_json(Path(sys.argv[1], "recipe.json").read_text())
    print(start_run(recipe, Path(sys.argv[1]) / "run")["best"]["score"])
