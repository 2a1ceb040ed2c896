"""The server's optimizer: a step of G from what the clients learned, in place of that itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import Factors
from fedex_lora.aggregation.aggregator import Aggregate
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.server_optimizer import ServerOptimizer

Memory = Mapping[str, Tensor]  # m/NAME and v/NAME


def optimized(
    optimizer: ServerOptimizer,
    memory: Memory,
    result: Aggregate,
    factors: Mapping[str, Factors],
    head: Mapping[str, Tensor],
    after: Mapping[str, Factors] | None,
    trained: frozenset[str],
) -> tuple[Aggregate, dict[str, Tensor]]:
    """The aggregate with G moved by the optimizer's step instead of Δ, and what it remembers.

    A method with a ledger keeps its factors as they are, and what the step has beyond Δ goes into
    the base, dense (out × in). Without one the step is of the factors that were averaged.

    Args:
        memory: As it was returned last.
        factors: Those that are part of G before the round.
        head: The head before the round.
        after: Those that are part of G after it; None where the method has no ledger.
        trained: Of "A" and "B"; a frozen one stays, and so does what is remembered of it.
    """
    kept = dict(memory)

    def step(name: str, move: Tensor) -> Tensor:
        m = kept.get(f"m/{name}", torch.zeros_like(move))
        if not optimizer.adaptive:
            m = kept[f"m/{name}"] = optimizer.momentum * m + move
            return optimizer.learning_rate * m
        square, tau, b = move.square(), optimizer.tau, optimizer.beta2
        v = kept.get(f"v/{name}", torch.full_like(move, tau**2))
        yogi = optimizer.name == "fedyogi"
        v = v - (1 - b) * square * (v - square).sign() if yogi else b * v + (1 - b) * square
        m = optimizer.momentum * m + (1 - optimizer.momentum) * move
        kept[f"m/{name}"], kept[f"v/{name}"] = m, v
        return optimizer.learning_rate * m / (v.sqrt() + tau)

    new_head = {n: head[n] + step(f"head/{n}", t - head[n]) for n, t in result.head.items()}
    if after is None:
        moved = {}
        for n, f in result.factors.items():
            a, b = factors[n].A, factors[n].B
            new_a = a + step(f"A/{n}", f.A - a) if "A" in trained else f.A
            new_b = b + step(f"B/{n}", f.B - b) if "B" in trained else f.B
            moved[n] = Factors(new_a, new_b, f.scale)
        return replace(result, head=new_head, factors=moved), kept
    increment = dict(result.increment)
    for n in sorted({*increment, *factors, *after}):
        parts = [increment[n].dense()] if n in increment else []
        parts += [after[n].delta().dense()] if n in after else []
        parts += [-factors[n].delta().dense()] if n in factors else []
        move = sum(parts[1:], parts[0])
        extra = Delta(step(f"layer/{n}", move) - move)
        increment[n] = extra + increment[n] if n in increment else extra
    return replace(result, head=new_head, increment=increment), kept
