"""Draws the README's pictures from a finished demo: `.venv/bin/python docs/pictures.py runs/demo`.

docs/report.png is the first screen of its report, taken by a headless Chromium; docs/terminal.svg
is what `fedex-lora demo` says at its end.
"""

import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from fedex_lora.cli.demo import verdict
from fedex_lora.cli.display import show_table
from fedex_lora.experiments.compare import difference_table, table
from fedex_lora.experiments.report.write import write_report

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1100, 760


def screen(runs: Path) -> None:
    """The first screen of the report."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"docs/report.png needs a browser: one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report([runs], page)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        options += [f"--screenshot={HERE / 'report.png'}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)


def still(runs: Path) -> None:
    """The last lines of the demo on a terminal of 96 columns."""
    results = json.loads((runs / "comparison.json").read_text())
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    console.print("$ fedex-lora demo", highlight=False)
    for one in (table(results), difference_table(results)):
        if one is not None:
            show_table(console, *one)
    console.print(verdict(results), highlight=False, markup=False)
    text = console.export_svg(title="fedex-lora", unique_id="demo")
    (HERE / "terminal.svg").write_text(text)


if __name__ == "__main__":
    runs = Path(sys.argv[1])
    still(runs)
    screen(runs)
