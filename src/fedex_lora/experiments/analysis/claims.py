"""The paper's claims, and what runs say about them: each part holds, does not, is not seen, or is
not tested.

Claims are those of arXiv 2410.09432 about named methods, so this table names methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedex_lora.experiments.analysis.statistics import Estimate

Outcome = Literal["holds", "does not hold", "not seen", "not tested"]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        where: Its tables and figures.
        needs: What runs show it.
        command: Runs that would, for a RECIPE of one's choice.
    """

    number: int
    text: str
    where: str
    needs: str
    command: str


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


CLAIMS = (
    Claim(
        1,
        "Exact aggregation scores at least as high as averaging the factors, that at least as high "
        "as freezing A; and near centralized training.",
        "Tables 1-3, 5, 10, 11",
        "fedex, fedit, ffa and centralized with the same seeds",
        "fedex-lora compare RECIPE --methods centralized,fedit,ffa,fedex --seeds 0,1,2,3,4",
    ),
    Claim(
        2,
        "Freezing A loses even with as many trained parameters (ffa at twice the rank).",
        "Section 2",
        "ffa with twice the lora.r of fedit or fedex",
        "fedex-lora compare RECIPE --methods ffa --set lora.r=8 --seeds 0,1,2,3,4, and fedit,fedex "
        "with lora.r=4",
    ),
    Claim(
        3,
        "Averaging the factors is the best assignment; fresh factors and keeping one's own are "
        "worse.",
        "Table 4",
        "fedex, fedex-reinit and fedex-keep with the same seeds",
        "fedex-lora compare RECIPE --methods fedex,fedex-reinit,fedex-keep --seeds 0,1,2,3,4",
    ),
    Claim(
        4,
        "The deviation of averaging falls with depth, grows with local epochs, is larger in Q than "
        "in V, and falls over rounds.",
        "Figures 2-9",
        "fedex or fedit, two rounds or more; for epochs, runs that differ in "
        "training.num_train_epochs",
        "fedex-lora compare RECIPE --methods fedex --set training.num_train_epochs=3 --seeds "
        "0,1,2,3,4, and again with 10",
    ),
    Claim(
        5,
        "The best rank is not the largest.",
        "Table 9",
        "one method with several lora.r",
        "fedex-lora compare RECIPE --methods fedex --set lora.r=R --seeds 0,1,2,3,4, for R in 1, "
        "2, 4, 8, 16, 32",
    ),
    Claim(
        6,
        "The residual's bytes are marginal: the initial model and the head dominate. They grow "
        "linearly with the number of clients.",
        "Table 8, section 3",
        "fedex and fedit with the same seeds; for the growth, runs with three or more "
        "federation.clients",
        "fedex-lora compare RECIPE --methods fedit,fedex --set federation.clients=K, for K in 2, "
        "3, 5, 10",
    ),
)
