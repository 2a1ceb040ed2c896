"""What is refused by name, and that the round then stays open as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from small_runs import recipe

from by_hand.rounds import state
from fedex_lora.errors import UserError
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.by_hand.closing import begin_run, close_round
from fedex_lora.runs.by_hand.opening import open_round
from fedex_lora.runs.by_hand.turning import take_turn
from fedex_lora.runs.run import resume_run
from fedex_lora.runs.rundir import RunDir

WEIGHTS, CONFIG = "update/adapter_model.safetensors", "update/adapter_config.json"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, `other` (another run) and, below `out`, folders whose turns are trained."""
    folder = tmp_path_factory.mktemp("opened")
    spec = recipe(folder, method={"name": "ffa"})
    for name in ("run", "other"):
        begin_run(spec, folder / name)
        open_round(folder / name, str(folder / f"out-{name}"))
    for client in ("ann", "bob", "cleo"):
        take_turn(str(folder / "out-run/round-0001" / client), folder / f"data/{client}.jsonl")
    return folder


@pytest.fixture
def copy(opened: Path, tmp_path: Path) -> Path:
    shutil.copytree(opened, tmp_path / "copy")
    return tmp_path / "copy"


def turns(copy: Path) -> list[str]:
    return [str(copy / "out-run/round-0001" / client) for client in ("ann", "bob", "cleo")]


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], None]:
    def edit(folder: Path, copy: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return edit


def config(**values: object) -> Callable[[Path, Path], None]:
    def edit(folder: Path, copy: Path) -> None:
        there = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**there, **values}))

    return edit


def half(found: dict[str, torch.Tensor]) -> None:
    found.update({name: value.half() for name, value in found.items()})


def frozen_factor(found: dict[str, torch.Tensor]) -> None:
    next(v for k, v in found.items() if k.endswith("lora_A.weight")).mul_(1.001)


def base_weight(found: dict[str, torch.Tensor]) -> None:
    found["base_model.model.roberta.embeddings.word_embeddings.weight"] = torch.ones(3, 2)


def no_head(found: dict[str, torch.Tensor]) -> None:
    del found[next(k for k in found if "classifier" in k)]


def not_a_number(found: dict[str, torch.Tensor]) -> None:
    next(v for k, v in found.items() if k.endswith("lora_B.weight"))[0, 0] = float("nan")


def whole_model(folder: Path, copy: Path) -> None:
    (folder / WEIGHTS).rename(folder / "update/model.safetensors")


def another_run(folder: Path, copy: Path) -> None:
    update = folder / "update"
    shutil.copytree(update, copy / "kept")
    shutil.rmtree(folder)
    shutil.copytree(copy / "out-other/round-0001/bob", folder)
    shutil.copytree(copy / "kept", folder / "update")


def forged(folder: Path, copy: Path) -> None:
    text = (folder / "turn.json").read_text()
    (folder / "turn.json").write_text(text.replace('"bob"', '"ann"'))


def recipe_changed(folder: Path, copy: Path) -> None:
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + "\n")


def no_rows(folder: Path, copy: Path) -> None:
    (folder / "update/update.json").unlink()


def minus_rows(folder: Path, copy: Path) -> None:
    (folder / "update/update.json").write_text('{"examples": -3}')


BAD = {
    "half": (tensors(half), "was saved in float16"),
    "frozen factor": (tensors(frozen_factor), "A of .* is frozen in this round, and was changed"),
    "frozen base": (tensors(base_weight), "word_embeddings.weight was trained or saved along"),
    "no head": (tensors(no_head), "classifier.* is missing"),
    "nan": (tensors(not_a_number), "NaN or infinite"),
    "whole model": (whole_model, "holds a whole model"),
    "another scale": (config(lora_alpha=99), "has scale 33 by its adapter_config.json"),
    "dora": (config(use_dora=True), "use_dora: True"),
    "another run": (another_run, "of another run"),
    "forged": (forged, "its turn.json is not the one that ann was sent"),
    "recipe": (recipe_changed, "recipe.yaml was changed"),
    "rows": (no_rows, "give `examples=bob=N`"),
    "minus rows": (minus_rows, "examples: .*greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_is_named_and_the_round_stays_open(name: str, copy: Path) -> None:
    spoil, why = BAD[name]
    spoil(copy / "out-run/round-0001/bob", copy)
    with pytest.raises(UserError, match=f"(?s)/bob: .*{why}.*Round 1 stays open"):
        close_round(copy / "run", turns(copy))
    assert RunDir(copy / "run").newest()[0] is None


def named_by_windows(folder: Path) -> None:
    """The adapter has a name of its own, and update.json is what PowerShell's `>` writes."""
    update, inner = folder / "update", folder / "update/hospital"
    inner.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (update / file).rename(inner / file)
    said = (update / "update.json").read_text()
    (update / "update.json").write_bytes(f"{said}\r\n".encode("utf-16"))


def test_an_update_with_a_name_of_its_own_is_the_same(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "other")
    close_round(copy / "run", turns(copy))
    named_by_windows(tmp_path / "other/out-run/round-0001/bob")
    close_round(tmp_path / "other/run", turns(tmp_path / "other"))
    expected, got = state(copy / "run"), state(tmp_path / "other/run")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_who_sends_nothing_is_left_out(copy: Path) -> None:
    assert close_round(copy / "run", [turns(copy)[0], turns(copy)[2]]) == {}
    (record,) = RunDir(copy / "run").records()
    assert record["lost"] == {"bob": "no update was given"}


def test_a_round_is_closed_once_and_stale_updates_are_refused(copy: Path) -> None:
    run = copy / "run"
    with pytest.raises(UserError, match=r"ann's, as .*/ann is; give one of them"):
        close_round(run, [turns(copy)[0], turns(copy)[0]])
    close_round(run, turns(copy))
    before = state(run)
    with pytest.raises(UserError, match=r"of round 1; the run waits .* round 2: round 1 is closed"):
        close_round(run, turns(copy))
    assert all(torch.equal(value, before[name]) for name, value in state(run).items())
    with pytest.raises(UserError, match="carried by hand"):
        resume_run(run)
    text = (run / "recipe.yaml").read_text().replace("rounds: 2", "rounds: 3")
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"federation.rounds"):
        close_round(run, turns(copy))


def test_a_round_is_not_opened_over_other_weights_and_changed_rows_are_told_at_its_close(
    copy: Path,
) -> None:
    run = copy / "run"
    close_round(run, turns(copy))
    file = run / "sources.json"
    then = json.loads(file.read_text())
    changed = {"rows": {**then["rows"], "evaluation rows of test": "0"}}
    file.write_text(json.dumps({**then, **changed}))
    open_round(run)
    assert json.loads(file.read_text())["changes"] == []  # nobody was told yet
    file.write_text(json.dumps({**then, "weights": "0"}))
    with pytest.raises(UserError, match=r"model\.name: .* has other pretrained weights"):
        open_round(run)


def test_a_turn_s_folder_is_as_it_was_signed(copy: Path) -> None:
    folder, data = copy / "out-run/round-0001/ann", copy / "data/ann.jsonl"
    with pytest.raises(UserError, match=r"not what the coordinator's run is: .*lora_alpha"):
        take_turn(str(folder), data, sets=["lora.lora_alpha=9"])
    other = copy / "out-other/round-0001/ann/coordinator.pub"
    with pytest.raises(UserError, match="signature is not by the coordinator's key"):
        take_turn(str(folder), data, key=other)
    shutil.rmtree(folder / "update")
    forged(copy / "out-run/round-0001/bob", copy)
    with pytest.raises(UserError, match="signature is not by the coordinator's key"):
        take_turn(str(copy / "out-run/round-0001/bob"), copy / "data/bob.jsonl")
    recipe_changed(folder, copy)
    with pytest.raises(UserError, match=r"recipe\.yaml: was changed since the"):
        take_turn(str(folder), data)
    assert not (folder / "update").exists()


def test_a_share_that_vanishes_half_way(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy / "run"
    open_round(run, "memory://vanishing")
    address = "memory://vanishing/round-0001/ann"
    take_turn(address, copy / "data/ann.jsonl")
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "get_file", gone)
        with pytest.raises(UserError, match=r"memory://.*/ann: cannot be reached: .*went away"):
            close_round(run, [address])
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "put_file", gone)
        with pytest.raises(UserError, match=r"cannot be reached: .*went away.*Nothing is lost"):
            open_round(run, "memory://elsewhere")
    assert close_round(run, [address]) == {}  # as if nothing had been


def gone(*_: object, **__: object) -> None:
    raise OSError("the share went away")


def test_on_the_command_line(command: Command, tmp_path: Path) -> None:
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    (tmp_path / "r.yaml").write_text(dump_recipe(spec))
    run, out = tmp_path / "run", tmp_path / "out"
    code, said, _ = command("round", "open", tmp_path / "r.yaml", "--out", run, "--to", out)
    assert code == 0 and f"ann: hand over {out}/round-0001/ann" in said
    folders = [out / "round-0001" / name for name in ("ann", "bob", "cleo")]
    code, _, told = command("round", "close", run, "--updates", *folders)
    assert code == 2 and told.count("no PEFT adapter") == 3
    for folder in folders:
        code, said, _ = command("turn", folder, "--data", tmp_path / f"data/{folder.name}.jsonl")
        assert code == 0 and f"Send back {folder}/update" in said
    code, said, _ = command("round", "close", run, "--updates", *folders)
    assert code == 0 and "Best round 1 of 1" in said
    code, _, told = command("round", "close", run, "--updates", *folders)
    assert code == 2 and "its last round, 1, is closed" in told
    assert command("turn", tmp_path / "nowhere")[0] == 2
    assert command("round", "open", tmp_path / "nowhere")[0] == 2
