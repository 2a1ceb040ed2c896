"""What a record says of a privacy budget, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_PRIVATE = "not private: a rehearsal, whose noise follows from the seed"


def line(privacy: Mapping[str, Any]) -> str:
    """What a record says of the budget, in a few words.

    Example:
        >>> line({"epsilon": {"a": 1.234, "b": 0.5}, "delta": 1e-5, "budget": 3, "private": True})
        'ε 1.23 of 3 (δ 1e-05)'
    """
    largest = max(privacy["epsilon"].values(), default=0.0)
    of = "" if privacy.get("budget") is None else f" of {privacy['budget']:g}"
    kind = "" if privacy["private"] is True else f"; {privacy['private']}"
    return f"ε {largest:.3g}{of} (δ {privacy['delta']:g}){kind}"


def sentences(privacy: Mapping[str, Any] | None) -> list[str]:
    """The same for a page or a card, client by client; nothing where nothing is private."""
    if privacy is None:
        return []
    if privacy["private"] is not True:
        return [str(privacy["private"]).capitalize()]
    each = ", ".join(f"{client} {value:.3g}" for client, value in privacy["epsilon"].items())
    whose = {"example": "any one row of a client", "client": "any one client"}
    return [
        f"Differential privacy at the {privacy['level']} level: whether {whose[privacy['level']]} "
        f"took part is hidden, at δ = {privacy['delta']:g} with these ε of all rounds: {each}"
    ]


_SEEN = {"update": "single updates", "owner": "single updates"}  # attacks that need more


def attacked(told: Mapping[str, Any]) -> list[str]:
    """What attack.json says, in words; nothing where nobody attacked, or it is damaged."""
    try:
        return [
            f"membership inference ({name}) on the {_SEEN.get(name, 'model')} of round "
            f"{told['round']}: AUC "
            f"{found['auc']:.3f} [{found['low']:.3f}, {found['high']:.3f}], advantage "
            f"{found['advantage']:+.3f}, {told['members']} members and {told['others']} others"
            for name, found in told.get("attacks", {}).items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
