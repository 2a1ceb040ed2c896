"""What a run with secure aggregation cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.recipe.part import Problem

if TYPE_CHECKING:
    from fedex_lora.recipe.blocks import Blocks


_SUMS = "the coordinator sees sums alone, with privacy.secure_aggregation"


def secure_problems(recipe: Blocks) -> Iterator[Problem]:
    """What is wrong with a recipe in which the coordinator is to see sums alone."""
    secure, fed = recipe.privacy.secure_aggregation, recipe.federation
    if secure is None:
        return
    key, method = "privacy.secure_aggregation", METHODS[recipe.method.name]
    if (reason := method.unfit_for_sums(recipe.lora.ranks is not None)) is not None:
        yield key, f"{recipe.method.name} {reason}; leave it out, or take another method"
    if fed.sampled < 2:
        yield key, f"a sum over {fed.sampled} client is that client's; take 2 or more"
    elif secure.threshold is not None and not fed.sampled / 2 < secure.threshold <= fed.sampled:
        yield (
            f"{key}.threshold",
            f"expected more than half of the {fed.sampled} clients of a round, and no more "
            f"than they are, got {secure.threshold}; two halves could be told two stories",
        )
    level = recipe.privacy.example_level
    if level is not None and level.epsilon is not None and secure.repeat:
        why = "would be paid for twice, which the noise of privacy.example_level is not planned for"
        yield f"{key}.repeat", f"a round that is begun anew {why}; set 0"
    if fed.combining.robust:
        yield "federation.mean", f"{fed.mean} needs every client's factors; {_SUMS}"
    if fed.scaffold:
        yield "federation.scaffold", f"the coordinator keeps every client's variate; {_SUMS}"
    if fed.align:
        yield "federation.align", f"needs every client's factors; {_SUMS}"
    sketched = {n for n, m in METHODS.items() if m.assignment.sketched and m.trains == "both"}
    cut = [n for n, m in METHODS.items() if m.residual == "truncated" or n in sketched]
    if secure.rank != "exact" and recipe.method.name not in cut:
        having = ", ".join(cut)
        yield f"{key}.rank", f"a sketch that loses something is for {having}; set it to exact"
    if recipe.records.save_updates:
        yield "records.save_updates", "under secure aggregation nobody sees an update"
    if recipe.evaluation.where != "server":
        why = "it would show single clients' scores, which secure aggregation is to hide"
        yield "evaluation.where", f"{why}; set it to server"
    if fed.oversample > 1:
        yield "federation.oversample", "secure aggregation waits for all who took part"
