"""Figures 2 to 9 of the paper on the page of claims: by layer, kind of matrix and round."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from results import model_name
from results_why import REFERENCE

from fedex_lora.experiments.analysis import deviation as dev
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.statistics import spread
from fedex_lora.experiments.compare import markdown_table

ABOUT = f"""\
## By layer, matrix and round

![Deviation by layer](layers.svg)

What Figures 2 to 9 of the paper show, of the runs of {REFERENCE}. After round 1: the mean deviation
‖ideal − averaged‖ of the deeper half of the layers over that of the other, and of all Q over all V;
and over all rounds, of the last over the first. In brackets the same of ‖ideal − averaged‖ /
‖ideal‖. Mean ± standard deviation over runs; the paper says below 1, above 1 and below 1. In the
plot a line is the mean over runs, after round 1.
"""
RATIOS: tuple[Callable[[Sequence[dev.Deviation], dev.Scaling], float | None], ...] = (
    dev.depth_trend,
    dev.query_over_value,
    dev.round_trend,
)
Kind = tuple[str, str, int, str, int, int]


def is_plain(run: Run) -> bool:
    """Whether it has none of the options that go with any method."""
    spec = run.recipe.federation
    return spec.mean == "weighted" and not spec.align and spec.server_optimizer is None


def dealt(run: Run) -> str:
    return "alike" if run.recipe.federation.partition.kind == "iid" else "uneven"


def kind(run: Run) -> Kind:
    """Runs of one kind are taken together."""
    r = run.recipe
    epochs, rounds = int(r.training.get("num_train_epochs", 1)), r.federation.rounds
    rows = r.data.train_examples
    return model_name(r.model.name), str(rows or "all"), r.lora.r, dealt(run), epochs, rounds


def grouped(runs: Sequence[Run]) -> dict[Kind, dict[str, list[dev.Deviation]]]:
    """The deviations of every run that averages factors, by kind and by task and seed."""
    found: dict[Kind, dict[str, list[dev.Deviation]]] = {}
    for run in runs:
        averages = is_plain(run) and run.recipe.method.name == REFERENCE
        if averages and (rows := dev.deviations(run)):
            sample = f"{run.recipe.name}, seed {run.recipe.seed}"
            found.setdefault(kind(run), {})[sample] = rows
    return dict(sorted(found.items()))


def ratio(
    samples: Sequence[Sequence[dev.Deviation]],
    trend: Callable[[Sequence[dev.Deviation], dev.Scaling], float | None],
) -> str:
    """exp of the trend of every run, of the deviation and, in brackets, relative to the ideal."""
    told = [
        spread([math.exp(t) for rows in samples if (t := trend(rows, scaling)) is not None])
        for scaling in ("absolute", "relative")
    ]
    return "-" if told[0] == "-" else f"{told[0]} ({told[1]})"


def layers(runs: Sequence[Run], svg: Path) -> Iterator[str]:
    """The section, and its plot."""
    found = grouped(runs)
    if not found:
        return
    yield ABOUT
    header = ["model", "rows", "r", "clients", "epochs", "rounds", "runs"]
    header += ["deeper / other half", "Q / V", "last / first round"]
    rows = [
        [*map(str, of), str(len(samples))] + [ratio([*samples.values()], trend) for trend in RATIOS]
        for of, samples in found.items()
    ]
    yield markdown_table(header, rows)
    draw(found, svg)


def draw(found: Mapping[Kind, Mapping[str, Sequence[dev.Deviation]]], svg: Path) -> None:
    """A panel a model: the deviation by layer after round 1, of Q and V."""
    models = [*dict.fromkeys(of[0] for of in found)]
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.8), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        first: dict[str, dict[str, Sequence[dev.Deviation]]] = {}  # however many rounds followed
        for (name, rows, rank, clients, epochs, _), samples in found.items():
            if name == model and clients == "alike":
                first.setdefault(f"r {rank}, {epochs} epochs, {rows} rows", {}).update(samples)
        for i, (label, samples) in enumerate(first.items()):
            for matrix, line in zip(dev.QUERY_VALUE, ("-", "--"), strict=True):
                curve = dev.across_layers([*samples.values()], matrix, "absolute")
                means = [fmean(values) for values in curve.values()]
                axes.plot([*curve], means, line, color=f"C{i}", label=f"{matrix}, {label}")
        axes.set(title=model, xlabel="layer", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="xx-small")
    panels[0][0].set_ylabel("‖ideal − averaged‖")
    figure.savefig(svg, metadata={"Date": None})
