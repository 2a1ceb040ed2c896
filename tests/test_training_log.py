"""The Trainer's own reports: who writes what where, and that nobody writes unasked."""

import types

import pytest
from small_runs import SIZES, recipe

from fedex_lora.engines import training_log
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training_log import TrainingLog, reported
from fedex_lora.errors import UserError
from fedex_lora.runs.run import resume_run, start_run

LOGGING = {"report_to": "tensorboard", "logging_steps": 1}


def scalars(folder, name):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(name)]


def test_every_client_and_round_has_its_own_event_files(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)  # where reports that know no place would go
    start_run(recipe(tmp_path, training=LOGGING), tmp_path / "run")
    found = {f.parent.relative_to(tmp_path / "run" / "logs").as_posix() for f in events(tmp_path)}
    assert found == {f"{c}/round-{r}" for c in SIZES for r in (1, 2)}
    for name in SIZES:
        losses = scalars(tmp_path / "run" / "logs" / name / "round-1", "train/loss")
        assert len(losses) == -(-SIZES[name] // 4) and min(losses) > 0


def events(folder):
    return [f for f in folder.rglob("*") if "tfevents" in f.name]


def test_nothing_is_written_unasked_and_rehearsal_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = recipe(tmp_path, federation={"rounds": 1})
    asked = recipe(tmp_path, training=LOGGING)
    before = set(tmp_path.rglob("*"))
    set_up(asked)  # builds a Trainer that trains nothing
    assert set(tmp_path.rglob("*")) == before
    start_run(plain, tmp_path / "run")
    assert not events(tmp_path) and not (tmp_path / "run" / "logs").exists()


def test_a_report_nobody_can_make_is_told_before_training(tmp_path):
    with pytest.raises(UserError, match=r"training: .*nowhere"):
        start_run(recipe(tmp_path, training={"report_to": "nowhere"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_report_that_fails_in_training_is_told_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    logging = recipe(tmp_path, training=LOGGING)

    def fail(*args, **kwargs):
        raise OSError("nobody answers")

    with monkeypatch.context() as patch, pytest.raises(UserError) as told:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
        start_run(logging, tmp_path / "run")
    assert str(told.value).startswith("training.report_to: OSError: nobody answers")
    assert resume_run(tmp_path / "run")["rounds"] == 2


def test_other_errors_in_training_are_not_taken_for_a_report_s(tmp_path):
    trainer = types.SimpleNamespace(callback_handler=types.SimpleNamespace(callbacks=[]))
    with pytest.raises(OSError), reported(trainer, TrainingLog(tmp_path, "run")):
        raise OSError("the disk is full")


@pytest.mark.parametrize("outer", [None, "begun by somebody else"])
def test_a_wandb_run_that_begins_in_a_turn_ends_with_it(monkeypatch, tmp_path, outer):
    finished = []
    wandb = types.SimpleNamespace(run=outer, finish=lambda: finished.append(wandb.run))
    monkeypatch.setitem(training_log.sys.modules, "wandb", wandb)
    trainer = types.SimpleNamespace(callback_handler=types.SimpleNamespace(callbacks=[]))
    with reported(trainer, TrainingLog(tmp_path, "run")):
        wandb.run = wandb.run or "ours"
    assert finished == ([] if outer else ["ours"])
