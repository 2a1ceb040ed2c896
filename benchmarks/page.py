"""docs/benchmarks.md, made from benchmarks/results.json.

python -m benchmarks.page > docs/benchmarks.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.results import goal, read, row_of, shown

INTRO = """# Benchmarks

`make bench DATA=DIR` measures all of this on your machine (DIR holds local copies of GLUE's cola
and mrpc), `python -m benchmarks ROW...` some of it; results go to benchmarks/results.json and
`python -m benchmarks.page` writes this page from them. Alternatives run in turn, so that what else
the machine does hits all of them; figures are medians, the spread is (largest − smallest) / median.
"""

# Why a goal is missed, and what was tried; shown only where it is.
_PROFILE = (
    "Tried and kept: bfloat16 where it is faster, and garbage collection after a turn that skips "
    "what was there before. "
    "A profile shows most of what is left in the forward and backward passes, and then in "
    "transformers' and PEFT's walks over the model's modules."
)
MISSED: Mapping[str, str] = {
    "cola": _PROFILE,
    "mrpc": _PROFILE,
    "language": (
        "Of a step of these four layers of Llama 3.2 1B half is below the output layer, and that "
        "is as it was; with all sixteen it is more, so that there memory is what is gained. With "
        "Gemma's 6 labels a row (24 of 380 positions) nine tenths of what is left are below the "
        "output layer, by the row with all positions; 2.51 and 2.47 in two series."
    ),
    "turns": (
        "Seeding as transformers does and a walk over the model in search of a device map took "
        "0.9 ms of the 6.1 that this was before. Of what is left, 2 ms are garbage collection "
        "before each training, the optimizer's and the loader's making, and reading the row."
    ),
    "residual": (
        "What is left above the least time: each factor is read, subtracted, averaged and written "
        "within the cache, and the new memory for residual and means is touched for the first "
        "time. Tried and kept: drifts from the first client's end in place of the broadcast (one "
        "input fewer), one site after the other for four clients at once, scaling while writing, "
        "right factors written in place, means in the memory that becomes the new factors. Tried "
        "without gain: huge pages (THP_MEM_ALLOC_ENABLE), means set to zero beforehand (slower)."
    ),
}


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    return "\n".join([INTRO, *(_section(name, entry) for name, entry in rows.items())])


def _section(name: str, entry: Mapping[str, Any]) -> str:
    row = row_of(entry)
    title = f"## {row.title}\n\n`python -m benchmarks {name}`\n"
    if row.skipped:
        return f"{title}\nNot measured: {row.skipped}.\n"
    lines = [
        f"| {f.what} | {shown(f)} | {'' if f.spread is None else f'{f.spread:.0%}'} | {goal(f)} |"
        for f in row.figures
    ]
    table = ["| | median | spread | goal |", "|---|---:|---:|---|", *lines]
    texts = [*row.notes, _where(entry["measured"])]
    if any(f.reached is False for f in row.figures) and name in MISSED:
        texts.insert(-1, MISSED[name])
    return "\n".join([title, *table, "", "\n\n".join(texts), ""])


def _where(measured: Mapping[str, Any]) -> str:
    gpu = f", {measured['gpu']}" if measured["gpu"] else ""
    return (
        f"{measured['date']}, commit {measured['commit']}: {measured['cpu']}{gpu}, "
        f"{measured['cores']} cores, {measured['threads']} of them used, "
        f"{measured['memory'] / 2**30:.0f} GiB; torch {measured['torch']}, transformers "
        f"{measured['transformers']}, PEFT {measured['peft']}, Python {measured['python']}."
    )


if __name__ == "__main__":
    print(page(read()), end="")
