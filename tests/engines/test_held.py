"""A client across machines exports what it holds: what the run came to, and it knows."""

from __future__ import annotations

import pytest
import torch
from small_runs import StopAfter, products, recipe

from engines.in_process import InProcess, institutions, remote
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.export import export_adapter
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run


@pytest.mark.parametrize("method", ["fedsa", "fedex-keep", "fedex-hetero"])
def test_it_exports_what_a_run_on_one_machine_would(method, command, tmp_path):
    alone = method == "fedsa"
    spec = recipe(
        tmp_path,
        method={"name": method},
        evaluation={"where": "clients", "client_fraction": 0.4},
        lora={} if alone else {"ranks": [2, 3, 4]},
    )
    start_run(spec, tmp_path / "here")
    courier = InProcess(institutions(spec, tmp_path / "cache"))
    start_run(remote(spec), tmp_path / "there", None, across_machines(courier))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(remote(spec)))
    last = open_run(tmp_path / "here", "last")
    for client in ("ann", "bob"):
        export_adapter(last, tmp_path / f"{client}-here", client=client if alone else None)
        out = tmp_path / f"{client}-there"
        given = ("--recipe", tmp_path / "recipe.yaml", "--name", client, "--out", out)
        code, said, errors = command("deploy", "export", tmp_path, *given)
        assert code == 0, errors
        assert "after round 2 of 2" in said
        assert f"trained by {client} with others" in (out / "README.md").read_text()
        expected, found = products(tmp_path / f"{client}-here"), products(out)
        for layer, product in expected.items():
            assert product.norm() > 0 and torch.equal(product, found[layer])


def test_what_it_does_not_hold_is_told(command, tmp_path):
    spec = recipe(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        courier = InProcess(institutions(spec, tmp_path / "cache"))
        start_run(remote(spec), tmp_path / "run", StopAfter(1), across_machines(courier))
    (folder,) = (tmp_path / "cache").iterdir()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(remote(spec)))
    other = remote(recipe(tmp_path, lora={"r": 2}))
    (tmp_path / "other.yaml").write_text(dump_recipe(other))

    def refused(file: str, name: str, *more: str) -> str:
        given = ("--recipe", tmp_path / file, "--name", name, *more)
        code, _, errors = command("deploy", "export", tmp_path, *given)
        assert code == 2 and not (tmp_path / "final").exists()
        return " ".join(errors.split())

    assert "ann holds the start of it alone" in refused("recipe.yaml", "ann")
    told = refused("recipe.yaml", "ann", "--run", "x")
    assert f"holds nothing of run x; runs that it has: {folder.name[:8]}" in told
    assert "dora holds nothing of any run" in refused("recipe.yaml", "dora")
    (folder / "ann" / "held.json").write_text("{}")
    assert "damaged" in refused("recipe.yaml", "ann")
    with pytest.raises(KeyboardInterrupt):
        courier = InProcess(institutions(spec, tmp_path / "cache"))
        start_run(remote(spec), tmp_path / "two", StopAfter(2), across_machines(courier))
    assert "not the recipe of run" in refused("other.yaml", "ann") and "lora.r" in refused(
        "other.yaml", "ann"
    )
