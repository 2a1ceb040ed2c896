"""The page in a real browser: it renders, asks for nothing, and never scrolls sideways."""

import pytest
from browser import browser
from made_up import made_up, spec
from test_report import EVIL, EVIL_CLIENT, broken, whole_grid

from fedex_lora.experiments.report.write import write_report

WIDE = """[...document.querySelectorAll('body *')].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, pre')
).map(e => e.tagName + '.' + e.className).slice(0, 5)"""
SEEN = """[...document.querySelectorAll('figure svg')].every(
  e => e.getBoundingClientRect().height > 80)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages of many runs, of broken ones, and of one with names that are not meant well."""
    folder = tmp_path_factory.mktemp("reports")
    write_report([whole_grid(folder / "g")], folder / "grid.html")
    write_report([broken(folder / "b")], folder / "broken.html")
    long = spec(name=EVIL + "x" * 200, model={"name": "a/" + "b" * 300})
    run = made_up(folder / "run", long, client_scores={EVIL_CLIENT: 0.5, "c" * 120: 0.4})
    write_report([run], folder / "evil.html")
    return folder


@pytest.mark.parametrize("name", ["grid", "broken", "evil"])
@pytest.mark.parametrize(("width", "dark"), [(380, True), (1280, False)])
def test_it_renders_and_fits(page, reports, name, width, dark):
    page.said.clear()
    page.open(reports / f"{name}.html", width, dark)
    assert page.said == []
    assert page.value("document.documentElement.scrollWidth") <= width, page.value(WIDE)
    assert page.value(WIDE) == []
    assert page.value("document.querySelectorAll('figure svg').length") >= 3
    assert page.value(SEEN)
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    ink = page.value("getComputedStyle(document.querySelector('figure svg text')).fill")
    light = [sum(map(int, c[4:-1].split(","))) > 380 for c in (ground, ink)]
    assert light == [not dark, dark]  # the ground follows the scheme, and text in figures too
