"""The report on disk: only files that are reports themselves are ever replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedex_lora.disk import write_atomic
from fedex_lora.errors import StorageError
from fedex_lora.experiments.analysis.runs import read_runs
from fedex_lora.experiments.analysis.study import Study, study
from fedex_lora.experiments.report.page import MARKER, build

_LOOKED_AT = 4096  # bytes at the beginning of a file, where the marker is


def write_report(
    paths: Sequence[Path], out: Path, plots: Path | None = None, refresh: int | None = None
) -> Study:
    """Reads the runs and writes the page, and its figures as SVG and PNG.

    Args:
        paths: Runs, or directories whose subdirectories are runs.
        out: The page.
        plots: Where the figures go; beside the page by default, e.g. `report-plots`.
        refresh: Seconds after which a browser loads it again, while runs go on.

    Raises:
        UserError: No runs there; a file to be written exists and is no report; it cannot be
            written.
    """
    check_ours(out)
    runs, problems = read_runs(paths)
    placed = study(runs)
    going_on = not all(p.run.finished for p in placed.placed)
    report = build(placed, problems, refresh if going_on else None)
    folder = plots or out.with_name(f"{out.stem}-plots")
    files = {out: report.html.encode(), **{folder / n: b for n, b in report.plots.items()}}
    for path in files:
        check_ours(path)
    for parent in (out.parent, folder):
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{parent}: cannot be made: {error.strerror}; name another `out`"
            ) from None
    for path, content in files.items():
        write_atomic(path, content)
    return placed


def check_ours(path: Path) -> None:
    """Raises a `UserError` if something that is no report would be overwritten."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            ours = MARKER.encode() in file.read(_LOOKED_AT)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror}; name another `out`"
        ) from None
    if not ours:
        raise StorageError(
            f"{path}: exists and is no report of this program, so it is not overwritten; name "
            "another file with `out`, or another folder with `plots`"
        )
