"""Transports and train functions of other packages, in recipes of this one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from commands import Command
from engines.in_process import InProcess, institutions, remote
from engines.test_wire import quick, same_bits
from small_runs import StopAfter, recipe

import fedex_lora as fl
from fedex_lora.aggregation.registry import points
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.extensions import TRAIN_FUNCTIONS, TRANSPORTS
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run

__all__ = ["quick"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "own_transport.py"


@pytest.fixture(autouse=True)
def as_before():
    """What a test registers is forgotten after it."""
    tables = TRANSPORTS, TRAIN_FUNCTIONS
    before = [(dict(t.data), dict(t._by)) for t in tables]
    yield
    for table, (data, by) in zip(tables, before):
        table.data, table._by = data, by
    points.cache_clear()
    sys.modules.pop("theirs", None)


def spec(folder: Path, **engine: object) -> Recipe:
    """A small recipe without the Trainer's arguments."""
    raw = recipe(folder).model_dump(exclude_unset=True)
    raw.pop("training")
    return Recipe.model_validate({**raw, "engine": engine})


def test_the_example_logs_what_it_carries_and_changes_no_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_transport.py", str(tmp_path)])
    own = spec(tmp_path).with_engine(kind="logged", train="plain-sgd")
    (tmp_path / "recipe.json").write_text(own.model_dump_json(exclude_unset=True))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert len((tmp_path / "run.log").read_text().splitlines()) == 2 * 3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert float(capsys.readouterr().out.split()[-1]) == results["best"]["score"]
    start_run(own.with_engine(kind="local"), tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        start_run(own, tmp_path / "stopped", StopAfter(1))
    resume_run(tmp_path / "stopped", own)
    same_bits(tmp_path / "local", tmp_path / "stopped")
    courier = InProcess(institutions(own.with_engine(kind="local"), tmp_path / "cache"))
    start_run(remote(own), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")


MODULE = """
from fedex_lora.runs.here import in_this_process

def carried(recipe, out, clients, watcher):
    watcher.note("carried by theirs")
    federation, engine = in_this_process(recipe.with_engine(kind="local"), out, clients, watcher)
    return federation, engine
"""


def test_the_command_line_knows_what_a_package_names(tmp_path, monkeypatch, command: Command):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs.py").write_text(MODULE)
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fedex_lora.transports]\npigeons = theirs:carried\n")
    points.cache_clear()
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(spec(tmp_path, kind="pigeons")))
    code, out, err = command("run", file, "--out", tmp_path / "run")
    assert code == 0 and "carried by theirs" in out + err
    start_run(spec(tmp_path), tmp_path / "local")
    same_bits(tmp_path / "local", tmp_path / "run")
    file.write_text(file.read_text().replace("pigeons", "pigeon"))
    code, _, err = command("run", file, "--out", tmp_path / "other")
    assert code == 2 and "'pigeon'; did you mean 'pigeons'" in err and "Traceback" not in err


def test_what_is_none_and_names_that_are_taken():
    def carried(recipe, out, clients, watcher): ...

    def other(recipe, out, clients, watcher): ...

    fl.register_transport("pigeons", carried)
    fl.register_transport("pigeons", carried)  # a notebook's cell that was run twice
    for name, row, why in (
        ("pigeons", other, "registered twice"),
        ("flower", carried, "fedex-lora has one of that name"),
        ("a b", carried, "expected a name of letters"),
        ("ships", 3, "3 is no function"),
        ("ships", lambda recipe: None, r"called with \(recipe, out, clients, watcher\)"),
    ):
        with pytest.raises(UserError, match=why):
            fl.register_transport(name, row)
    with pytest.raises(UserError, match=r"called with \(module, rows, round=, client=, rng=\)"):
        fl.register_train("loop", lambda module, rows: None)


@pytest.mark.parametrize(
    "blocks, why",
    [
        ({"training": {"learning_rate": 0.1}}, "training: engine.train is a loop with arguments"),
        ({"federation": {"proximal": 0.1}}, "federation.proximal: engine.train is a loop"),
        ({"federation": {"scaffold": True}}, "federation.scaffold: engine.train is a loop"),
        ({"engine": {"train": "loop", "fuse": 3}}, "engine.fuse: engine.train trains one client"),
        ({"engine": {"train": "loop", "precision": "bfloat16"}}, "engine.precision: engine.train"),
        ({"method": {"name": "fed-sb"}}, "engine.train: fed-sb needs the Trainer"),
        ({"engine": {"train": "loup"}}, "got 'loup'; did you mean 'loop'"),
        (
            {"privacy": {"example_level": {"epsilon": 1.0, "delta": 1e-5}}},
            "privacy.example_level: engine.train is a loop",
        ),
    ],
)
def test_what_does_not_go_with_a_loop_of_ones_own(blocks, why, tmp_path):
    def loop(module, rows, *, round, client, rng): ...

    fl.register_train("loop", loop)
    raw = spec(tmp_path, train="loop").model_dump(exclude_unset=True)
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block}
    with pytest.raises(ValueError, match=why):
        Recipe.model_validate(raw)


def test_auto_is_what_a_loop_of_ones_own_can(tmp_path):
    def loop(module, rows, *, round, client, rng):
        return fl.Trained({})

    fl.register_train("loop", loop)
    auto = spec(tmp_path, train="loop", fuse="auto", precision="auto")
    start_run(auto, tmp_path / "run")
    named = open_run(tmp_path / "run").recipe.engine
    assert (named.fuse, named.precision) == (1, "float32")


def test_a_run_whose_loop_is_gone_says_who_had_it(tmp_path):
    def loop(module, rows, *, round, client, rng):
        return fl.Trained({})

    fl.register_train("loop", loop)
    start_run(spec(tmp_path, train="loop"), tmp_path / "run")
    TRAIN_FUNCTIONS.data.clear()
    with pytest.raises(RecipeError, match=r"engine.train: 'loop' is a train function .* test_ext"):
        resume_run(tmp_path / "run")
