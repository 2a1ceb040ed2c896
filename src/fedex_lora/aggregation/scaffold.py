"""SCAFFOLD: control variates, which correct every client's steps for what is its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedex_lora.aggregation.combining import Combining
    from fedex_lora.aggregation.methods import Method


def scaffold_problems(method: Method, combining: Combining) -> Iterator[tuple[str, str]]:
    """What control variates do not go with, and why.

    With g the gradient of a client's loss, y where it is and x where it began, it steps along

        g(y) − cᵢ + c,    and ends with    cᵢ' = cᵢ − c + (x − y)/(Kη)        (option II),

    which after K steps of plain SGD is the mean of the gradients g that it took. That mean is what
    cᵢ' is here under every optimizer, schedule and clipping. The server has c = Σ pᵢcᵢ over all
    clients, pᵢ being their shares of the weights; who is absent keeps its cᵢ, zero at first. The
    paper has equal shares and SGD.

    Source:
        Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        arXiv 1910.06378, algorithm 1.
    """
    if method.pooled or not method.exchanges:
        yield "scaffold", "nothing is exchanged"
    elif not method.averages:
        told = "which this method makes anew, or leaves with the clients"
        yield "scaffold", f"variates are of factors that all clients share and go on from, {told}"
    if combining.robust:
        yield "scaffold", f"variates are averaged plainly, so {combining.mean} would not hold them"
    if combining.align:
        yield "scaffold", "align turns factors away from those that the variates are of"
