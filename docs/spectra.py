"""Draws docs/spectra.svg and prints a table, from runs with `records.spectrum`:

.venv/bin/python docs/spectra.py runs/rank-collapse
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

BANDS = {"1-2": (0, 2), "3-4": (2, 4), "5-8": (4, 8)}


def shares(record: dict, first: int, end: int) -> float:
    """Σ_{first<j≤end} σⱼ² / ‖G − W0‖², the mean over layers."""
    sizes = record["change_by_site"]
    return fmean(
        sum(s**2 for s in spectrum[first:end]) / sizes[layer] ** 2
        for layer, spectrum in record["spectrum_by_site"].items()
    )


def read(folder: Path) -> dict[str, list[dict]]:
    """The records of every method's run."""
    found = {}
    for file in sorted(folder.rglob("metrics.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name.removesuffix("-seed0")] = records
    return found


def draw(runs: dict[str, list[dict]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, records in runs.items():
        rounds = [record["round"] for record in records]
        axes.plot(rounds, [1 - shares(r, 0, 2) for r in records], "o-", label=method)
    axes.set(
        xlabel="round", ylabel="share of ‖G − W0‖² beyond the second direction", ylim=(0, None)
    )
    axes.legend()
    figure.savefig(Path(__file__).with_name("spectra.svg"))


if __name__ == "__main__":
    runs = read(Path(sys.argv[1]))
    draw(runs)
    names = [*BANDS, "beyond 8"]
    print(f"| method | round | {' | '.join(f'σ {name}' for name in names)} | ‖G − W0‖ |")
    print(f"|{'---|' * (len(names) + 3)}")
    for method, records in runs.items():
        for record in (records[0], records[-1]):
            told = [shares(record, *band) for band in BANDS.values()]
            told.append(max(0.0, 1 - sum(told)))
            size = fmean(record["change_by_site"].values())
            cells = " | ".join(f"{share:.1%}" for share in told)
            print(f"| {method} | {record['round']} | {cells} | {size:.3f} |")
