"""Run directories as they are found: killed, edited, damaged, in use, and with many rounds."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from small_runs import StopAfter, recipe

from fedex_lora.errors import UserError
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs import shelf
from fedex_lora.runs.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fedex_lora.runs.lock import LOCK, OWNER, locked
from fedex_lora.runs.reopened import read_round
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

HOLDER = """
import sys, time
from pathlib import Path
from fedex_lora.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


class Notes(Silent):
    def __init__(self, stop=None):
        self.notes, self.stop = [], stop

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rundir")


@pytest.fixture(scope="module")
def whole(folder):
    """(recipe, a run of three rounds that was not interrupted, one after two of them), of keep."""
    spec = recipe(folder, method={"name": "fedex-keep"}, federation={"rounds": 3})
    start_run(spec, folder / "run")
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, folder / "begun", StopAfter(2))
    return spec, folder / "run", folder / "begun"


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of the run that was interrupted after two rounds."""
    return shutil.copytree(whole[2], tmp_path / "begun")


def same_end(one, other):
    """The last state, clients' own factors among it, bit for bit."""
    for a, b in zip(
        *(sorted((p / "checkpoints").rglob("*000[3-9]*.safetensors")) for p in (one, other)),
        strict=True,
    ):
        x, y = load_file(a), load_file(b)
        assert a.name == b.name and x.keys() == y.keys()
        assert all((v == y[k]).all() for k, v in x.items())


# --- two processes


@pytest.fixture
def holder():
    """Starts a process that holds a directory's lock, and returns it."""
    started = []

    def hold(directory):
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True
            )
        )
        assert started[-1].stdout.readline().strip() == "held"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_process_is_stopped_and_told_by_whom(whole, begun, holder, command, tmp_path):
    spec, run, _ = whole
    other = holder(begun)
    who = rf"begun: in use by process {other.pid} on {socket.gethostname()} since 20\d\d-.*; wait "
    before = {f: f.read_bytes() for f in begun.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=who):
        resume_run(begun, spec)
    code, _, err = command("resume", begun)
    assert code == 2 and f"process {other.pid} on" in err and "Traceback" not in err
    assert {f: f.read_bytes() for f in begun.rglob("*") if f.is_file()} == before
    other.kill()  # -9: nothing tidies up, and yet nothing is stuck
    other.wait()
    resume_run(begun, spec)
    same_end(begun, run)
    assert not (begun / OWNER).exists()


def test_a_new_run_does_not_begin_where_another_is_about_to(whole, holder, tmp_path):
    (tmp_path / "new").mkdir()
    other = holder(tmp_path / "new")
    with pytest.raises(UserError, match=f"in use by process {other.pid}"):
        start_run(whole[0], tmp_path / "new")
    assert {f.name for f in (tmp_path / "new").iterdir()} == {LOCK, OWNER}


def test_a_run_holds_its_lock_to_the_end_and_lets_it_go(whole, tmp_path):
    seen = []

    class Look(Silent):
        def round_done(self, record):
            told = json.loads((tmp_path / "run" / OWNER).read_text())
            with (
                pytest.raises(UserError, match=f"process {os.getpid()} on"),
                locked(tmp_path / "run"),
            ):
                pass
            seen.append(told["process"])

    start_run(recipe(tmp_path, federation={"rounds": 1}), tmp_path / "run", Look())
    assert seen == [os.getpid()] and not (tmp_path / "run" / OWNER).exists()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"process": 1}'])
def test_who_holds_it_may_be_unreadable(tmp_path, content):
    with locked(tmp_path):
        (tmp_path / OWNER).write_bytes(content)
        with pytest.raises(UserError, match="in use by another process"), locked(tmp_path):
            pass


def test_a_directory_that_cannot_be_locked_is_said(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match="cannot be locked"), locked(tmp_path):
        pass


# --- killed before there was anything


@pytest.mark.parametrize(
    "left",
    [[], ["checkpoints/"], [LOCK], [LOCK, OWNER], [LOCK, f"{OWNER}.new"], ["recipe.yaml.new"],
     [LOCK, OWNER, "recipe.yaml.new", "checkpoints/"]],
)  # fmt: skip
def test_a_kill_before_the_recipe_is_written_leaves_nothing_stuck(whole, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir() if name.endswith("/") else (run / name).write_bytes(b"half")
    RunDir(run).check_free()
    with RunDir(run).held():
        RunDir(run).create(whole[0])
    assert RunDir(run).recipe() == whole[0]


def test_a_kill_right_after_the_recipe_can_be_resumed(whole, tmp_path):
    spec, run, _ = whole
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(spec))
    resume_run(tmp_path / "run")
    same_end(tmp_path / "run", run)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/x", ".hidden", "recipe.yml"])
def test_what_may_be_somebody_s_is_in_use(whole, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="is in use"):
        RunDir(tmp_path).check_free()


# --- edited


def test_a_recipe_that_was_edited_after_the_start_is_refused_at_resume_too(whole, begun, command):
    file = begun / "recipe.yaml"
    text = file.read_text()
    file.write_text(
        text.replace("lora_alpha: 5", "lora_alpha: 7").replace("rounds: 3", "rounds: 9")
    )
    code, _, err = command("resume", begun)
    assert code == 2 and "recipe.yaml: was changed after the run began" in err
    assert "lora.lora_alpha: 7.0 != 5.0; federation.rounds: 9 != 3. Put it back" in err
    assert "changed after the run began" in read_round(begun).notes[-1]
    file.write_text(text)
    resume_run(begun)
    same_end(begun, whole[1])


def test_a_checkpoint_of_a_version_that_kept_no_recipe_is_resumed(whole, begun):
    for path in checkpoints(begun / "checkpoints"):
        state, extra = load_checkpoint(path)
        save_checkpoint(
            begun / "checkpoints", state, {k: v for k, v in extra.items() if k != "recipe"}
        )
    resume_run(begun)
    same_end(begun, whole[1])


# --- damaged factors of clients


def own_files(run, version):
    return sorted((run / "checkpoints" / "own").glob(f"{version:04d}-*"))


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_file_of_own_factors_is_replaced(whole, begun):
    """The round is run once more, and makes a file of the same name."""
    for file in own_files(begun, 2):
        damage(file)
    notes = Notes()
    resume_run(begun, None, notes)
    assert "lacks the factors of ann" in notes.notes[0]
    assert all(map(shelf.intact, (begun / "checkpoints" / "own").iterdir()))
    same_end(begun, whole[1])


def test_keep_restarts_from_what_is_left(whole, begun):
    """Nothing of it can be used here: it begins again, says so, and ends where it would have."""
    for version in (1, 2):
        for file in own_files(begun, version):
            damage(file)
    notes = Notes()
    results = resume_run(begun, None, notes)
    assert any("none is intact; the run begins again" in note for note in notes.notes)
    assert results["rounds"] == 3 and len(RunDir(begun).records()) == 3
    same_end(begun, whole[1])


# --- odd content

WHOLE = '{"round": 1, "clients": {}, "bytes_up": {}, "bytes_down": {}, "seconds": %s}'
ODD = {
    "metrics.jsonl": [b"[]", b"3", b"null", b"{}", b'{"round": "1"}', b'{"round": true}', b"\xff",
                      b'{"round": 1, "clients": []}', b'{"round": 1, "score": "x"}',
                      b'{"round": 1}', b"[" * 100_000, (WHOLE % 1).encode(),
                      (WHOLE % "null").encode()],
    "results.json": [b"[]", b"3", b'"x"', b"{}", b'{"best": 3}', b'{"best": {"scores": {}}}'],
    "environment.json": [b"[]", b"3", b'"x"'],
}  # fmt: skip


@pytest.mark.parametrize("name, content", [(n, c) for n, cs in ODD.items() for c in cs])
def test_odd_content_is_an_error_that_names_the_file(whole, begun, command, name, content):
    (begun / name).write_bytes(content)
    code, _, err = command("resume", begun)
    assert code == 2 and f"{name}" in err and "damaged (" in err and "delete the" in err
    assert "Traceback" not in err and (begun / name).read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"0" * 64, b"[]\n"])
def test_an_odd_digest_is_a_damaged_checkpoint_that_is_named(whole, begun, content):
    (begun / "checkpoints" / "round-0002.sha256").write_bytes(content)
    notes = Notes()
    resume_run(begun, None, notes)
    assert "round-0002.safetensors: checkpoint is corrupted or truncated" in notes.notes[0]
    same_end(begun, whole[1])


def test_other_files_of_a_run_are_named_too(whole, tmp_path, command):
    run = shutil.copytree(whole[1], tmp_path / "run")
    (run / "results.json").write_text('{"best_round": "x"}')
    for name in ("evaluate", "export"):
        code, _, err = command(name, run)
        assert code == 2 and "results.json: damaged (" in err and "Traceback" not in err
    (tmp_path / "comparison.json").write_text('{"fedit": [3]}')
    (tmp_path / "r.yaml").write_text(dump_recipe(whole[0]))
    code, _, err = command("compare", tmp_path / "r.yaml", "--methods", "fedit", "--out", tmp_path)
    assert code == 2 and "comparison.json: damaged (fedit: 0: " in err


def test_a_checkpoint_that_is_none_of_a_run_is_not_used(whole, begun):
    state, _ = load_checkpoint(begun / "checkpoints" / "round-0002.safetensors")
    save_checkpoint(begun / "checkpoints", state, {"record": {"round": 2}, "clients": "ann"})
    notes = Notes()
    resume_run(begun, None, notes)
    assert "round-0002.safetensors: damaged (clients: " in notes.notes[0]
    same_end(begun, whole[1])


def test_records_that_are_missing_are_said(whole, begun):
    (begun / "metrics.jsonl").unlink()
    notes = Notes()
    resume_run(begun, None, notes)
    assert any("metrics.jsonl: no record of round 1; totals lack them" in n for n in notes.notes)
    assert [r["round"] for r in RunDir(begun).records()] == [2, 3]


def test_a_place_where_nothing_can_be_made_is_named_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file: no directory to write into; name another"):
        RunDir(tmp_path / "file" / "runs" / "one").check_free()
    RunDir(tmp_path / "a" / "b").check_free()
