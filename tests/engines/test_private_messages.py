"""Privacy across machines, without machines: the bits, bounds and accounts of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import StopAfter, recipe

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import same_bits
from fedex_lora.engines.setup import set_up_server
from fedex_lora.errors import QuorumLost
from fedex_lora.recipe import Recipe
from fedex_lora.runs import private
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir

CLIENT = {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3, "adaptive": True}
EXAMPLE = {"epsilon": 30.0, "delta": 1e-3}


def made(folder: Path, method: str, sums: bool, **level: Any) -> Recipe:
    federation = {"clients": 3, "rounds": 2, "weights": "uniform"}
    privacy = {**level, "secure_aggregation": sums, "rehearsal": True}
    training = {"per_device_train_batch_size": 3} if "example_level" in level else {}
    return recipe(
        folder,
        method={"name": method},
        federation=federation,
        privacy=privacy,
        training=training,
    )


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(
    ("method", "level"), [("ffa", {"client_level": CLIENT}), ("fedex", {"example_level": EXAMPLE})]
)
def test_messages_bring_the_bits_the_bound_and_the_account_of_one_process(
    tmp_path: Path, method: str, level: dict[str, Any], sums: bool
) -> None:
    spec = made(tmp_path, method, sums, **level)
    start_run(spec, tmp_path / "local")
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    start_run(remote(spec), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    here, there = (RunDir(tmp_path / name).records() for name in ("local", "remote"))
    for one, other in zip(here, there, strict=True):
        assert not one["refused"] and not other["refused"]
        for key in ("epsilon", "private", "clip", "next_clip"):
            assert one["privacy"].get(key) == other["privacy"].get(key)
    if "client_level" in level:
        assert here[1]["privacy"]["clip"] != CLIENT["clip"]


def test_sums_of_privately_trained_updates_are_what_they_were(tmp_path: Path) -> None:
    for sums in (False, True):
        start_run(made(tmp_path, "fedex", sums, example_level=EXAMPLE), tmp_path / str(sums))
    plain, summed = (RunDir(tmp_path / str(sums)).newest()[0] for sums in (False, True))
    assert plain is not None and summed is not None
    for name, factors in plain.factors.items():
        product, other = factors.delta().dense(), summed.factors[name].delta().dense()
        assert (product - other).norm() < 1e-6 * product.norm(), name


def test_a_client_takes_no_bound_where_its_own_recipe_has_none_that_follows(tmp_path: Path) -> None:
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    across = across_machines(InProcess(institutions(spec, tmp_path / "cache")))

    def telling(*arguments: Any) -> Any:
        federation, engine = across(*arguments)
        return replace(federation, settings=replace(federation.settings, clip=0.5)), engine

    with pytest.raises(QuorumLost, match=r"told a bound; that of its own recipe is fixed"):
        start_run(remote(spec), tmp_path / "run", None, telling)


def test_an_account_that_a_client_forgot_does_not_lower_what_the_record_says(
    tmp_path: Path,
) -> None:
    """Clients that begin anew after round 1 tell the ε of one turn again."""
    spec = remote(made(tmp_path, "fedex", True, example_level=EXAMPLE))
    clients = institutions(spec, tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "run", StopAfter(1), across_machines(InProcess(clients)))
    (first,) = RunDir(tmp_path / "run").records()
    spent = {**first["privacy"]["epsilon"], "ann": 29.5}
    first["privacy"]["epsilon"] = spent
    engine: Any = None
    told = private.told(set_up_server(spec), engine, {"clients": first["clients"]}, [first])
    assert told["epsilon"] == spent
