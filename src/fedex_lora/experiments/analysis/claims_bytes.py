"""Claim 6 of the paper: what the residual adds to the bytes, and how that grows with clients.

Bytes are counted, not estimated: they are the same for every seed but for a few of a message's
header, so there is no interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.finding import Finding, Outcome
from fedex_lora.experiments.analysis.runs import Run, head_numbers
from fedex_lora.experiments.analysis.statistics import percent
from fedex_lora.experiments.analysis.study import Placed, Study, deviates, is_exact_average
from fedex_lora.model.load import locate

_MARGINAL = 0.1  # of all bytes; in the paper's Table 8 at most 0.083
_BENT = 0.02  # relative distance from a straight line


@dataclass(frozen=True)
class Share:
    """Bytes of one pair of runs, all clients and rounds together.

    Attributes:
        extra: Of exact averaging beyond plain averaging.
        exact: Of exact averaging, all.
        head: Of the trained head, within that.
        initial: The pretrained model, once to every client; None where its files are not here.
    """

    extra: float
    exact: float
    head: float
    initial: float | None

    def part(self, bytes: float) -> float:
        return bytes / (self.exact + (self.initial or 0))


def marginal(study: Study) -> Finding:
    """Whether the residual's bytes are at most a tenth, the initial model sent once as well."""
    part = f"the residual is at most {percent(_MARGINAL)} of all bytes, the initial model included"
    shares = list(_shares(study))
    if not shares:
        why = "no finished runs of exact and of plain averaging with the same seed and settings"
        return Finding(6, part, "not tested", why)
    alone = statistics.fmean(s.extra / s.exact for s in shares)
    text = f"{percent(alone)} of the bytes after the initial model"
    if any(s.initial is None for s in shares):
        text += "; the initial model's size is not known here (its files are not on this machine)"
        return Finding(6, part, "not seen", text)
    extra = statistics.fmean(s.part(s.extra) for s in shares)
    model = statistics.fmean(s.part(s.initial or 0) for s in shares)
    head = statistics.fmean(s.part(s.head) for s in shares)
    text = f"{percent(extra)} of all (initial model {percent(model)}, head {percent(head)}); {text}"
    outcome: Outcome = "holds" if extra <= _MARGINAL else "does not hold"
    return Finding(6, part, outcome, text)


def _shares(study: Study) -> Iterator[Share]:
    plain = {
        (p.task, p.seed, p.others()): p
        for p in study.placed
        if deviates(p.method)
        and p.method.averages
        and p.method.residual == "dropped"
        and p.run.finished
    }
    for p in study.placed:
        other = plain.get((p.task, p.seed, p.others()))
        if not is_exact_average(p.method) or not p.run.finished or other is None:
            continue
        exact, less = _total(p.run.results or {}), _total(other.run.results or {})
        fed = p.run.recipe.federation
        messages = fed.sampled * fed.rounds * 2  # up, and down with the final delivery
        head = 4.0 * head_numbers(p.run.path) * messages
        yield Share(exact - less, exact, head, _initial(p.run))


def _total(results: Mapping[str, float]) -> float:
    return results["bytes_up"] + results["bytes_down"]


def _initial(run: Run) -> float | None:
    """Bytes of the pretrained model's files, once for every client."""
    try:
        folder = Path(locate(run.recipe.model.name))
    except UserError:
        return None
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    size = sum(f.stat().st_size for f in files)
    return float(size * run.recipe.federation.clients) if files else None


def linear_in_clients(study: Study) -> Finding:
    """Whether the bytes down a client and round lie on a straight line in the number of clients."""
    part = "bytes to a client grow linearly with the number of clients"
    key = "federation.clients"
    points = _by_clients(study, key)
    if len(points) < 3:
        why = f"no finished runs of exact averaging with three or more {key}"
        return Finding(6, part, "not tested", why)
    k = np.array(sorted(points))
    down = np.array([statistics.fmean(points[x]) for x in k.tolist()])
    fitted = np.polyval(np.polyfit(k, down, 1), k)
    off = float(np.max(np.abs(fitted - down) / down))
    told = ", ".join(f"{x}: {size / 1e6:.2f} MB" for x, size in zip(k.tolist(), down.tolist()))
    text = f"a client and round, by clients {told}; at most {percent(off)} from a straight line"
    return Finding(6, part, "holds" if off <= _BENT else "does not hold", text)


def _by_clients(study: Study, key: str) -> dict[int, list[float]]:
    """Bytes down by number of clients, of runs that are equal in all else: of those with the most
    such numbers."""
    groups: dict[tuple[str, str], dict[int, list[float]]] = {}
    for p in study.placed:
        if is_exact_average(p.method) and key in p.settings and p.run.finished:
            alike = groups.setdefault((p.task, p.others(key)), {})
            alike.setdefault(p.run.recipe.federation.sampled, []).append(_down(p))
    return max(groups.values(), key=len, default={})


def _down(p: Placed) -> float:
    """Bytes to one client in one round, without the first, in which all have the start already."""
    rounds = [r for r in p.run.records if r["round"] > 1]
    sizes = [size for r in rounds for size in r["bytes_down"].values()]
    return statistics.fmean(sizes) if sizes else float("nan")
