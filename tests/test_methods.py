"""How methods are found: in the table, by a call, by packages that are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from oracles import SITES
from small_runs import recipe
from test_aggregate import federation, run

from fedex_lora.aggregation.adapter import Factors
from fedex_lora.aggregation.assignment import (
    BOTH,
    OWN_PAIR,
    Alone,
    Assigned,
    Assignment,
    Average,
    Keep,
    OwnSvd,
    Reinit,
)
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.methods import METHODS, Method, get_method, register_method
from fedex_lora.aggregation.registry import points
from fedex_lora.errors import UserError
from fedex_lora.runs.run import start_run

AVERAGE = Method("both", Average(), "dropped", "me")
MODULE = """
from fedex_lora.aggregation.assignment import Average
from fedex_lora.aggregation.methods import Method

class Own(Average):
    name = "own"

ROW = Method("both", Own(), "dropped", "a package")
"""


@pytest.fixture(autouse=True)
def as_before():
    """What a test registers is forgotten after it."""
    before, by = dict(METHODS.data), dict(METHODS._by)
    yield
    METHODS.data, METHODS._by = before, by
    points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Makes a package with an entry point, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(package: str, name: str, module: str = MODULE) -> None:
        (tmp_path / f"{package}.py").write_text(module)
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[fedex_lora.methods]\n{name} = {package}:ROW\n")
        points.cache_clear()

    yield made
    for name in ("theirs", "others"):
        sys.modules.pop(name, None)


def parts(**facts: object) -> Assignment:
    """An average with other facts."""
    return type("Odd", (Average,), {"name": "odd", "__module__": __name__, **facts})()


def test_this_package_s_own_methods_do_not_contradict_themselves():
    assert len(METHODS) >= 14
    assert not [(name, why) for name, m in METHODS.items() for why in m.problems()]


A, B = frozenset("A"), frozenset("B")
PRODUCT = frozenset({"product"})


@pytest.mark.parametrize(
    "assignment, why",
    [
        (parts(shared=BOTH, own=B), "B is both shared and own"),
        (parts(shared=A), "B is neither shared nor own"),
        (parts(shared=B, own=NotImplemented), "own is NotImplemented; expected a set of A and B"),
        (parts(shared="AB"), "shared is 'AB'; expected a set of A and B"),
        (parts(needs={"median"}), r"needs is \{'median'\}; expected a set of ends and increment"),
        (parts(private=True), "private is about own factors, and there are none"),
        (parts(dealt=True), "dealt is about own factors"),
        (parts(shared=A, own=B, dealt=True, private=True), "deals out are not private"),
        (parts(shared=A, own=B, drawn=True), "drawn from the seed are no client's own"),
        (parts(shared=A, own=B, head_private=True), "clients that exchange nothing"),
        (parts(shared=A, own=B, private=True, needs=PRODUCT), "product of factors that are priv"),
        (parts(shared=A, own=B, private=True, sent_up=lambda s, t: t), "sent_up is more than"),
        (parts(shared=A, own=B, sent_down=lambda s, t: t), "sent_down, where B is trained, is"),
        (parts(sparse=lambda s, round: round < 2), "`condensed` is missing"),
        (parts(own=OWN_PAIR, private=True), "`pair` is missing"),
        (parts(name=""), "its `name` is missing"),
        (Average, r"its assignment is <class.*Average'>; expected an Assignment, as Average\(\)"),
    ],
)
def test_an_assignment_that_contradicts_itself_is_refused_at_once(assignment, why):
    with pytest.raises(UserError, match=f"^method 'odd': .*{why}"):
        register_method("odd", replace(AVERAGE, assignment=assignment))
    assert "odd" not in METHODS


@pytest.mark.parametrize(
    "method, why",
    [
        (replace(AVERAGE, assignment=Alone(), residual="exact"), "the server does not see"),
        (replace(AVERAGE, assignment=Keep(), residual="zero"), "a residual is not zero"),
        (replace(AVERAGE, assignment=OwnSvd(), trains="all"), "no factors that could be own"),
        (replace(AVERAGE, trains="A"), "trains is 'A'; expected one of both, B, alternate, inn"),
        (replace(AVERAGE, residual="kept"), "residual is 'kept'; expected one of exact, trunc"),
        (replace(AVERAGE, source=""), "its `source` is missing"),
        (Average(), r"Average\(\) is no Method; expected Method\(trains, assignment, residual"),
        (lambda s: s, "is no Method"),
    ],
)
def test_a_method_that_lacks_a_part_is_refused_at_once(method, why):
    with pytest.raises(UserError, match=f"^method 'odd': .*{why}"):
        register_method("odd", method)


@pytest.mark.parametrize("name", ["", "a:4", "a,b", "../a", "two words"])
def test_names_that_lists_and_folders_could_not_hold_are_refused(name):
    with pytest.raises(UserError, match="expected a name of letters"):
        register_method(name, AVERAGE)


def test_a_name_is_given_once():
    with pytest.raises(UserError, match="'fedex': registered twice, by fedex-lora and fedex_lora"):
        register_method("fedex", AVERAGE)
    register_method("mine", AVERAGE)
    register_method("mine", AVERAGE)  # a cell of a notebook that was run twice
    with pytest.raises(UserError, match=r"'mine': registered twice.*rename one"):
        register_method("mine", replace(AVERAGE, residual="exact"))
    with pytest.raises(UserError, match=r"'mine': registered twice, by .* and test_methods"):
        register_method("mine", replace(AVERAGE, assignment=parts()))
    assert get_method("mine") is METHODS["mine"] is AVERAGE


def test_a_package_s_method_is_imported_when_a_recipe_names_it(install, tmp_path, command):
    install("theirs", "fed-theirs")
    assert "fed-theirs" in METHODS and "theirs" not in sys.modules
    assert next(iter(METHODS)) == "fedit" and list(METHODS)[-1] == "fed-theirs"
    with pytest.raises(ValueError, match="no method 'fed-their'; did you mean 'fed-theirs'"):
        recipe(tmp_path, method={"name": "fed-their"})
    assert "theirs" not in sys.modules
    recipe(tmp_path, method={"name": "fed-theirs"})
    assert METHODS["fed-theirs"].source == "a package"
    code, out, _ = command("methods")
    assert code == 0 and "fed-theirs" in out and "a package" in out


def test_package_against_package_and_table(install, tmp_path, command):
    install("theirs", "fedex")
    with pytest.raises(UserError, match=r"'fedex': registered twice, by fedex-lora and theirs"):
        get_method("fedex")
    with pytest.raises(ValueError, match="registered twice"):
        recipe(tmp_path)
    code, _, err = command("methods")
    assert code == 2 and "registered twice" in err and "Traceback" not in err
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text(
        "[fedex_lora.methods]\nmine = theirs:ROW\n"
    )
    points.cache_clear()
    with pytest.raises(UserError, match=r"'mine': registered twice, by theirs \(theirs:ROW\) and"):
        register_method("mine", AVERAGE)
    install("others", "mine")
    with pytest.raises(UserError, match=r"'mine': registered twice, by (theirs|others) .* and "):
        get_method("mine")


@pytest.mark.parametrize(
    "module, why",
    [
        ("", "cannot be imported: AttributeError"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("ROW = 3", "3 is no Method"),
        (MODULE + "\nOwn.private = True", "private is about own factors"),
    ],
)
def test_a_package_that_is_broken_is_named(install, module, why, command):
    install("theirs", "mine", module)
    with pytest.raises(UserError, match=f"^method 'mine': .*{why}"):
        get_method("mine")
    code, _, err = command("methods")
    assert code == 2 and why in err and "Traceback" not in err


class Wrong(Average):
    name = "wrong"
    given: Callable[..., Assigned]

    def __init__(self, given):
        object.__setattr__(self, "given", given)

    def assign(self, s):
        return self.given(s)


@pytest.mark.parametrize(
    "given, why",
    [
        (lambda s: None, "a NoneType; expected Assigned"),
        (lambda s: s.moved, r"expected Assigned\(factors, left_out\)"),
        (lambda s: Assigned(None), "no factors, and clients are to get some"),
        (lambda s: Assigned(Factors(s.mean.A.T, s.mean.B.T, 1.0)), "A and B of shapes .*expected"),
        (lambda s: Assigned(s.mean, Delta(s.mean.A)), "a residual of shape"),
    ],
)
def test_an_assignment_that_gives_something_else_is_named_before_a_run(given, why, tmp_path):
    method = replace(AVERAGE, assignment=Wrong(given))
    register_method("wrong", method)
    starts, ends = federation(method, 2, 0)
    with pytest.raises(UserError, match=f"^assignment 'wrong': assign gave .*{why}"):
        run(method, SITES, starts, ends, [1, 2])
    with pytest.raises(UserError, match=f"^assignment 'wrong': assign gave .*{why}"):
        start_run(recipe(tmp_path, method={"name": "wrong"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_method_only_a_script_knew_says_where_it_was_registered(command, tmp_path):
    run, there = tmp_path / "run", tmp_path / "there"
    register_method("mine", replace(AVERAGE, assignment=parts()))
    start_run(recipe(tmp_path, method={"name": "mine"}, federation={"rounds": 1}), run)
    start_run(recipe(tmp_path, federation={"rounds": 1}), there)
    assert "registered" not in json.loads((there / "environment.json").read_text())
    del METHODS.data["mine"]
    for words in (("report",), ("export",), ("resume",)):
        code, _, err = command(*words, run)
        told = " ".join(err.split())
        assert code == 2 and "method.name: 'mine' is a method that neither" in told
        assert f"registered by {parts.__module__}" in told and "fedex_lora.methods" in told


def test_reading_the_table_imports_no_torch():
    code = """
import sys
from fedex_lora.aggregation.methods import METHODS, get_method
assert get_method("fedex").averages and len(list(METHODS.items())) >= 14
print([m for m in ("torch", "transformers") if m in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_subclass_of_average_is_no_average():
    """Reports that compare with averaging must not take another assignment for it."""
    assert METHODS["fedex"].averages and not replace(AVERAGE, assignment=parts()).averages
    assert not replace(AVERAGE, assignment=Reinit()).averages
