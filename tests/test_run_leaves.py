"""What a run leaves of itself in its process: nothing."""

import gc

import pytest
import torch
from small_runs import StopAfter, recipe

from fedex_lora.engines.setup import set_up
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.state import begin
from fedex_lora.runs.here import local_engine
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.watch import Silent


@pytest.mark.parametrize("training", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_training_leaves_nothing_behind_on_the_shared_model(tmp_path, training):
    """Neither a wrapper nor a hook; so what is evaluated does not depend on who trained before."""
    spec = recipe(tmp_path, training=training, federation={"rounds": 3})
    results = start_run(spec, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    resumed = resume_run(tmp_path / "run")
    assert resumed["last"] == results["last"]
    federation = set_up(spec)
    hooks = _hooks(federation.model.module)
    engine = local_engine(federation)
    run_round(begin(federation.settings, federation.initial), federation.settings, engine)
    assert _hooks(federation.model.module) == hooks


def _hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_collections_of_garbage_are_as_before_once_a_run_ends(tmp_path):
    skipped = []

    class Looks(Silent):
        def round_done(self, record):
            skipped.append(gc.get_freeze_count())

    start_run(recipe(tmp_path), tmp_path / "run", Looks())
    assert len(skipped) == 2 and min(skipped) > 0 and gc.get_freeze_count() == 0


def test_a_run_and_its_resumption_take_the_recipe_s_threads_and_leave_the_caller_s(tmp_path):
    spec, seen = recipe(tmp_path, engine={"threads": 3}), []

    class Looks(StopAfter):
        def round_done(self, record):
            seen.append(torch.get_num_threads())
            super().round_done(record)

    before = torch.get_num_threads()
    assert before != 3
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "run", Looks(1))
    assert torch.get_num_threads() == before
    resume_run(tmp_path / "run", watcher=Looks(0))
    assert torch.get_num_threads() == before and seen == [3, 3]
