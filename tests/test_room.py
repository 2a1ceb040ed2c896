"""What is refused for want of room before a run trains, and that nothing is made twice for it."""

import shutil
from types import SimpleNamespace

import psutil
import pytest
import transformers
from small_runs import recipe

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines import setup
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError
from fedex_lora.federation.settings import Settings
from fedex_lora.model import adapted, architectures
from fedex_lora.recipe import Recipe
from fedex_lora.runs.plan.memory import ledger_numbers, server_memory, turn_memory
from fedex_lora.runs.plan.traffic import DryRun
from fedex_lora.runs.preflight import check_room, check_weights
from fedex_lora.runs.run import start_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


def changed(r: Recipe, block: str, **values) -> Recipe:
    return r.model_copy(update={block: getattr(r, block).model_copy(update=values)})


def with_free(monkeypatch, disk: int = 10**12, memory: int = 10**12) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))


def test_a_run_makes_everything_once(folder, tmp_path, monkeypatch):
    counts: dict[str, int] = {}

    def counted(where, name):
        original = getattr(where, name)

        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    counted(adapted, "inject")
    counted(architectures, "inject")
    counted(setup, "federation_settings")
    counted(setup, "architecture")
    counted(transformers.Trainer, "__init__")
    start_run(recipe(folder, federation={"rounds": 2}), tmp_path / "run")
    assert counts == {
        "inject": 1,
        "federation_settings": 1,
        "__init__": 1,
    }  # one Trainer, for all turns


@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_grows_as_the_formula_says(name):
    """Never less than the formula, and no more where clients start alike and nothing is cut."""
    method = METHODS[name]
    layers = {"a": LayerShape(24, 32, 2, 1.0), "b": LayerShape(8, 8, 2, 1.0)}
    rank = 3 if method.residual == "truncated" else None
    for rounds in (1, 2, 4, 12):
        settings = Settings(method, 0, ("x", "y", "z"), layers, rounds, rank=rank)
        run = DryRun(settings, {})
        seen = []
        for _ in range(rounds):
            run.round()
            seen.append(run.ledger_bytes() // 4)
        assert ledger_numbers(settings) <= max(seen)
        if rank is None and not (method.assignment.own and method.in_ledger):
            assert ledger_numbers(settings) == max(seen)


def test_the_ledger_by_hand():
    """Three clients of rank 2 leave 4·(24 + 32) numbers of one layer a round, and 8·8 of the other.

    Before round 4 three rounds hold more than both matrices, which take their place.
    """
    layers = {"a": LayerShape(24, 32, 2, 1.0), "b": LayerShape(8, 8, 2, 1.0)}
    each, dense = 4 * (24 + 32) + 8 * 8, 24 * 32 + 8 * 8
    largest = {1: each, 3: 3 * each, 4: dense + each, 5: dense + 2 * each, 12: dense + 2 * each}
    for rounds, numbers in largest.items():
        settings = Settings(METHODS["fedex"], 0, ("x", "y", "z"), layers, rounds)
        assert ledger_numbers(settings) == numbers


def test_too_little_disk_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    r, out = recipe(folder, "gpt2"), tmp_path / "not" / "yet"
    start_run(r, tmp_path / "there")
    largest = max(f.stat().st_size for f in (tmp_path / "there" / "checkpoints").glob("*.safet*"))
    with_free(monkeypatch, disk=2 * largest)  # two rounds; what a header takes is not counted
    check_room(set_up(r), out)
    with pytest.raises(UserError, match=r"the run will write .* or more"):
        check_room(set_up(changed(r, "records", save_updates=True)), out)
    with_free(monkeypatch, disk=2 * (largest - 8192))
    with pytest.raises(UserError, match=r"not/yet: the run will write .* within 2 rounds"):
        start_run(r, out)
    assert not out.parent.exists()


def test_too_little_memory_is_said(folder, tmp_path, monkeypatch):
    r = recipe(folder, "gpt2", model={"device": "cpu"}, federation={"rounds": 1})
    federation = set_up(r)
    settings, head = federation.settings, 0
    factors = 4 * sum(3 * (layer.out + layer.inp) for layer in settings.layers.values())
    ledger = 4 * ledger_numbers(settings)
    state = factors + ledger
    turn = {part.what: part.bytes for part in turn_memory(r, settings, head, ledger)}
    assert turn["optimizer"] == 2 * factors and turn["start and end of a turn"] == 2 * factors
    parts = [*turn_memory(r, settings, head, ledger), *server_memory(settings, head, state, 0)]
    certain = sum(part.bytes for part in parts if not part.estimate)
    with_free(monkeypatch, memory=certain)
    check_room(federation, tmp_path)
    with_free(monkeypatch, memory=certain - 1)
    with pytest.raises(UserError, match=r"needs at least .* of memory for what is trained"):
        check_room(federation, tmp_path)


def test_weights_that_do_not_fit_are_not_loaded(folder, tmp_path, monkeypatch):
    r = recipe(folder, "gpt2", model={"device": "cpu"})
    size = 4 * setup.architecture_of(r, setup.recipe_task(r)).size
    with_free(monkeypatch, memory=size)
    check_weights(r)
    check_weights(changed(r, "model", name="somebody/something"))  # loading it will tell

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_model", load)
    with_free(monkeypatch, memory=size - 1)
    with pytest.raises(UserError, match=r"needs at least .* of memory for the model's weights"):
        start_run(r, tmp_path / "run")
    check_weights(changed(r, "model", dtype="bfloat16"))
    assert not (tmp_path / "run").exists()
