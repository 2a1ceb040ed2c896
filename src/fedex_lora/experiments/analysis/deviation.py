"""How far averaging the factors is from the ideal update, by layer, kind of matrix and round.

Of every site the records hold ‖Σ wᵢsᵢBᵢAᵢ − s·B̄Ā‖_F (the deviation) and ‖Σ wᵢsᵢBᵢAᵢ‖_F (the
ideal). The paper plots a "scaled Frobenius norm" (section 5, figures 2-9) and does not say how it
is scaled; so three scalings are offered, each named where it is shown.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedex_lora.experiments.analysis.runs import Run, site_shapes

Scaling = Literal["absolute", "entry", "relative"]
SCALINGS: Mapping[Scaling, str] = {
    "absolute": "Frobenius norm of ideal − averaged",
    "entry": "Frobenius norm / √(m·n): root mean square of an entry",
    "relative": "Frobenius norm / that of the ideal product",
}
QUERY_VALUE = ("Q", "V")

_KINDS = (  # the first that a site's name matches; names of BERT, GPT-2, Llama, DistilBERT, T5, ViT
    ("Q", r"\b(query|q_proj|q_lin|q)$"),
    ("K", r"\b(key|k_proj|k_lin|k)$"),
    ("V", r"\b(value|v_proj|v_lin|v)$"),
    ("QKV", r"(c_attn|qkv_proj|query_key_value|qkv|Wqkv|in_proj)$"),
    (
        "O",
        r"(o_proj|out_proj|out_lin|attn\.c_proj|attention\.output\.dense|attention\.dense"
        r"|self_attention\.dense|Attention\.o)$",
    ),
    (
        "MLP up",
        r"(up_proj|gate_proj|gate_up_proj|c_fc|fc1|lin1|intermediate\.dense|\bwi(_\d)?|h_to_4h)$",
    ),
    ("MLP down", r"(down_proj|c_proj|fc2|lin2|output\.dense|\bwo|4h_to_h)$"),
    ("embedding", r"(embed\w*|\bwte|\bwpe|shared)$"),
)


@dataclass(frozen=True)
class Deviation:
    """One site in one round of one run.

    Attributes:
        layer: The first number in the site's name; None if there is none.
        kind: Which matrix: Q, K, V, QKV, O, MLP up, MLP down, embedding, or the name's last part.
        deviation: ‖ideal − averaged‖_F.
        ideal: ‖ideal‖_F.
        numbers: m·n, how many entries the matrix has; None where no file of the run tells.
    """

    round: int
    site: str
    layer: int | None
    kind: str
    deviation: float
    ideal: float
    numbers: int | None

    def scaled(self, scaling: Scaling) -> float | None:
        """The deviation in that scaling; None where it is not known (or the ideal is 0)."""
        if scaling == "relative":
            return self.deviation / self.ideal if self.ideal else None
        if scaling == "entry":
            return self.deviation / math.sqrt(self.numbers) if self.numbers else None
        return self.deviation


def kind_of(site: str) -> str:
    """Which matrix of a layer a site is, by its name.

    Example:
        >>> kind_of("roberta.encoder.layer.3.attention.self.query")
        'Q'
        >>> kind_of("transformer.h.0.mlp.c_proj"), kind_of("transformer.h.0.attn.c_proj")
        ('MLP down', 'O')
        >>> kind_of("model.layers.1.self_attn.v_proj"), kind_of("score")
        ('V', 'score')
    """
    found = (kind for kind, pattern in _KINDS if re.search(pattern, site))
    return next(found, site.rpartition(".")[2])


def layer_of(site: str) -> int | None:
    """The layer's index: the first part of the name that is a number.

    Example:
        >>> layer_of("transformer.h.11.attn.c_attn"), layer_of("pooler.dense")
        (11, None)
    """
    return next((int(part) for part in site.split(".") if part.isdecimal()), None)


def deviations(run: Run) -> list[Deviation]:
    """A row for every site and round of a run; none where nothing was averaged."""
    shapes = site_shapes(run.path)
    rows = []
    for record in run.records:
        ideals = record.get("ideal_by_site") or {}
        for site, deviation in (record.get("deviation_by_site") or {}).items():
            ideal = ideals.get(site)
            if deviation is None or ideal is None:
                continue
            numbers = math.prod(shapes[site]) if site in shapes else None
            rows.append(
                Deviation(
                    record["round"], site, layer_of(site), kind_of(site), deviation, ideal, numbers
                )
            )
    return rows


def kinds(rows: Iterable[Deviation]) -> list[str]:
    """The kinds of matrices there are; Q and V alone where both are, as the paper plots them."""
    found = list(dict.fromkeys(row.kind for row in rows))
    both = [kind for kind in QUERY_VALUE if kind in found]
    return both if len(both) == 2 else found


Curve = Mapping[int, list[float]]  # by layer or round, ascending: a mean a run that has it


def across_layers(
    runs: Sequence[Sequence[Deviation]], kind: str, scaling: Scaling, round: int = 1
) -> Curve:
    """Deviation by layer after one round (figures 2, 4, 5), over the runs of one arm."""
    return _curve(
        (
            (row.layer, row.scaled(scaling))
            for row in rows
            if row.kind == kind and row.round == round and row.layer is not None
        )
        for rows in runs
    )


def across_rounds(
    runs: Sequence[Sequence[Deviation]],
    scaling: Scaling,
    kinds: Sequence[str],
    layer: int | None = None,
) -> Curve:
    """Deviation by round, the mean over layers of these kinds (figures 3, 6-9), over the runs of
    one arm.

    Args:
        layer: Only this one; all by default.
    """
    return _curve(
        (
            (row.round, row.scaled(scaling))
            for row in rows
            if row.kind in kinds and layer in (None, row.layer)
        )
        for rows in runs
    )


def _curve(runs: Iterable[Iterable[tuple[int | None, float | None]]]) -> Curve:
    """The mean at every x within each run."""
    by_x: dict[int, list[float]] = {}
    for pairs in runs:
        of_run: dict[int, list[float]] = {}
        for x, value in pairs:
            if x is not None and value is not None:
                of_run.setdefault(x, []).append(value)
        for x, values in of_run.items():
            by_x.setdefault(x, []).append(statistics.fmean(values))
    return dict(sorted(by_x.items()))


def best_scaling(rows: Iterable[Deviation]) -> Scaling:
    """By entry where all shapes are known, else absolute: what compares matrices of other sizes."""
    return "entry" if all(row.numbers for row in rows) else "absolute"


# What the paper says of the deviation, each as one number a run.


def depth_trend(rows: Sequence[Deviation], scaling: Scaling) -> float | None:
    """Log of the deviation in the deeper half of the layers over that in the other, after round 1;
    the mean over the kinds of matrices."""
    known = []
    for kind in kinds(rows):
        layers = across_layers([rows], kind, scaling)
        middle = (min(layers) + max(layers)) / 2 if layers else 0
        deep = [v for x, (v,) in layers.items() if x > middle]
        shallow = [v for x, (v,) in layers.items() if x < middle]
        if (trend := _log_ratio(deep, shallow)) is not None:
            known.append(trend)
    return statistics.fmean(known) if known else None


def query_over_value(rows: Sequence[Deviation], scaling: Scaling) -> float | None:
    """Log of the mean deviation of Q over that of V after round 1."""
    curves = (across_layers([rows], kind, scaling) for kind in QUERY_VALUE)
    q, v = ([mean for (mean,) in curve.values()] for curve in curves)
    return _log_ratio(q, v)


def round_trend(rows: Sequence[Deviation], scaling: Scaling) -> float | None:
    """Log of the mean deviation in the last round over that in the first."""
    means = [*across_rounds([rows], scaling, kinds(rows)).values()]
    return _log_ratio(means[-1], means[0]) if len(means) > 1 else None


def first_round(rows: Sequence[Deviation], scaling: Scaling) -> float | None:
    """Log of the mean deviation after round 1: its differences are log ratios."""
    return _log_ratio(across_rounds([rows], scaling, kinds(rows)).get(1, []), [1.0])


def _log_ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    if not above or not below or min(*above, *below) <= 0:
        return None
    return math.log(statistics.fmean(above) / statistics.fmean(below))


def table(runs: Mapping[str, Sequence[Deviation]]) -> Iterator[dict[str, object]]:
    """Plain rows, for a CSV file: run, round, site, layer, kind, and the three scalings."""
    for name, rows in runs.items():
        for row in rows:
            yield {
                "run": name,
                "round": row.round,
                "site": row.site,
                "layer": row.layer,
                "kind": row.kind,
                **{s: row.scaled(s) for s in SCALINGS},
            }
