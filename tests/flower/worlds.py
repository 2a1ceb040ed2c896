"""Made-up clients of a strategy, with the dense float64 mean that their answers must come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from hypothesis import strategies as st
from peft import LoraConfig

from fedex_lora.flower.arrays import received
from flower.nodes import InProcess, failure, identity, reply, served  # noqa: F401

P = "base_model.model."
Tensors = dict[str, torch.Tensor]


@dataclass
class World:
    """Layers by (out, in, r), and clients that answer with random factors of them."""

    layers: Mapping[str, tuple[int, int, int]]
    weights: list[int]
    alpha: float = 6.0
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.answers: list[list[Tensors]] = []  # by round, by client

    @property
    def config(self) -> LoraConfig:
        ranks = {name: r for name, (_, _, r) in self.layers.items()}
        return LoraConfig(
            r=99,
            lora_alpha=self.alpha,
            rank_pattern=ranks,
            use_rslora=self.rslora,  # type: ignore
        )

    def scale(self, layer: str) -> float:
        rank = self.layers[layer][2]
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def draw(self, b: float = 1.0, spread: float = 1.0, like: Tensors | None = None) -> Tensors:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self.random)

        found = {}
        for name, (out, inp, r) in self.layers.items():
            found[f"{P}{name}.lora_A.weight"] = normal(r, inp) * spread
            found[f"{P}{name}.lora_B.weight"] = normal(out, r) * spread * b
        found[f"{P}classifier.weight"] = normal(2, 3) * spread
        return found if like is None else {name: t + like[name] for name, t in found.items()}

    def initial(self) -> ArrayRecord:
        return ArrayRecord(self.draw(b=0.0))  # type: ignore[arg-type]

    def grid(self, spread: float = 1.0) -> InProcess:
        def client(i: int):
            def answer(message: Message) -> Message:
                if message.metadata.message_type == "evaluate":
                    return reply(message, {}, num_examples=1, loss=0.0)
                start, _ = received(message.content)
                update = self.draw(spread=spread, like=start)
                round = int(message.content["config"]["server-round"])  # type: ignore[index]
                while len(self.answers) < round:
                    self.answers.append([{}] * len(self.weights))
                self.answers[round - 1][i] = update
                return reply(message, update, num_examples=self.weights[i])

            return answer

        return InProcess(client(i) for i in range(len(self.weights)))

    def oracle(self) -> dict[str, torch.Tensor]:
        """G − W0 in float64: each round the mean of where clients ended, the base being what the
        averages left of the G before."""
        w = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        found = {}
        for name, (out, inp, _) in self.layers.items():
            base = g = torch.zeros(out, inp, dtype=torch.float64)
            for answers in self.answers:
                ends = [(one[f"{P}{name}.lora_B.weight"].double(),
                         one[f"{P}{name}.lora_A.weight"].double()) for one in answers]  # fmt: skip
                g = sum(n * (base + self.scale(name) * b @ a) for n, (b, a) in zip(w, ends))
                mean_b = sum((n * b for n, (b, _) in zip(w, ends)), torch.zeros(()))
                mean_a = sum((n * a for n, (_, a) in zip(w, ends)), torch.zeros(()))
                base = g - self.scale(name) * mean_b @ mean_a
            found[name] = g
        return found

    def size(self, name: str) -> float:
        """What the terms of the oracle's sum come to where none cancels another: rounding is of
        that size, whatever is left of the sum."""
        ends = [
            (n, one[f"{P}{name}.lora_B.weight"].norm() * one[f"{P}{name}.lora_A.weight"].norm())
            for answers in self.answers
            for n, one in zip(self.weights, answers)
        ]
        return self.scale(name) * sum(n * float(norms) for n, norms in ends) / sum(self.weights)

    def close(self, found: Tensors, more: Tensors | None = None) -> bool:
        """Whether a change is the oracle's, and `more`, to float32's digits of its terms."""
        for name, g in self.oracle().items():
            beside = more[name] if more else torch.zeros_like(g)
            exact, terms = g + beside, self.size(name) + float(beside.norm())
            if (found[name] - exact).norm() > 1e-5 * exact.norm() + 1e-6 * terms:
                return False
        return True

    def change(self, arrays: ArrayRecord | RecordDict) -> dict[str, torch.Tensor]:
        """T + s·B·A of what a client or a server receives."""
        tensors, base = received(arrays)
        found = {}
        for name, (out, inp, _) in self.layers.items():
            b, a = (tensors[f"{P}{name}.lora_{x}.weight"].double() for x in "BA")
            t = base[name].dense().double() if name in base else torch.zeros(out, inp)
            found[name] = t + self.scale(name) * b @ a
        return found


@st.composite
def worlds(draw) -> World:
    sizes = draw(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=3))
    layers = {f"h.{i}.q": (out, inp, r) for i, (out, inp, r) in enumerate(sizes)}
    weights = draw(st.lists(st.integers(1, 50), min_size=2, max_size=5))
    return World(layers, weights, draw(st.sampled_from([2.0, 7.0])), draw(st.booleans()),
                 draw(st.integers(0, 99)))  # fmt: skip
