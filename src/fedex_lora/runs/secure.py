"""What is said of secure aggregation when a run starts."""

from __future__ import annotations

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.recipe import Recipe


def lacking(recipe: Recipe) -> str:
    """What a run with secure aggregation does without, in one note."""
    method, fed = METHODS[recipe.method.name], recipe.federation
    missing = ["norms and losses by client"]
    if fed.max_norm_ratio is not None:
        missing.append("federation.max_norm_ratio")
    if method.trains == "both" and (method.assignment.needs or not method.in_ledger):
        missing.append("the deviation of plain averaging")
    told = "a client that sends nonsense spoils its round and cannot be named"
    if fed.max_norm is not None:
        told += f"; clients clip their updates to federation.max_norm, {fed.max_norm:g}"
    few = ""
    if fed.clients == 2:
        few = " With two clients each can work out the other's numbers from the sum."
    return (
        f"secure aggregation: the coordinator sees sums alone, so there is no "
        f"{', no '.join(missing)}; {told}.{few} See docs/privacy.md"
    )
