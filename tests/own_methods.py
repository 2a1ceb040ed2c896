"""Methods that this package does not have, registered as others would register theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedex_lora.aggregation.adapter import Factors
from fedex_lora.aggregation.assignment import Assigned, Assignment, Average
from fedex_lora.aggregation.delta import concat
from fedex_lora.aggregation.methods import METHODS, Method, register_method

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_method.py"


class AveragedAOwnB(Assignment):
    """A is averaged and each client goes on from its own B; G moves by the mean change."""

    name = "A averaged, B own"
    shared, own, needs = frozenset("A"), frozenset("B"), frozenset({"increment"})

    def assign(self, s):
        return Assigned(s.moved, s.increment)


class OnlyA(Average):
    """A is averaged, B goes back to its start, and what that takes away goes into the base."""

    def assign(self, s):
        factors = Factors(s.moved.A, s.start.B, s.layer.scale)
        missed = [s.moved.delta(), factors.delta().scaled(-1.0), s.averages_miss]
        return Assigned(factors, concat([part for part in missed if part is not None]))


OWN = {
    "own-b": Method("both", AveragedAOwnB(), "exact", "test"),
    "only-a": Method("both", OnlyA(), "exact", "test"),
}
NAMES = ["own-fedsa", *OWN]


@contextmanager
def registered() -> Iterator[None]:
    """With FedSA-LoRA as the example has it, and the methods above."""
    definition = EXAMPLE.read_text().partition("\n# clients that disagree")[0]
    exec(compile(definition, str(EXAMPLE), "exec"), {"__name__": "own_method"})
    for name, method in OWN.items():
        register_method(name, method)
    try:
        yield
    finally:
        for name in NAMES:
            del METHODS[name]
