"""What runs say about one part of a claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedex_lora.experiments.analysis.statistics import Estimate

Outcome = Literal["holds", "does not hold", "not seen", "not tested"]


@dataclass(frozen=True)
class Finding:
    """One part of a claim, held against runs.

    Attributes:
        claim: Its number.
        outcome: "not seen" if the interval does not settle it; "not tested" if the runs given
            have nothing to say about it.
        evidence: The number with its interval, or what is missing.
    """

    claim: int
    part: str
    outcome: Outcome
    evidence: str


def judged(claim: int, part: str, e: Estimate, evidence: str) -> Finding:
    """A claim that a mean is above 0: it holds, or not, only if the intervals leave out 0."""
    outcomes: dict[int, Outcome] = {1: "holds", -1: "does not hold", 0: "not seen"}
    return Finding(claim, part, outcomes[e.sign], evidence)
