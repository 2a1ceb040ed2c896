"""How kinds of tasks are found: in this package, by a call, by packages that are installed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny, tokenizer_of
from transformers import PreTrainedTokenizerBase

from fedex_lora.aggregation.registry import points
from fedex_lora.engines.remote.replies import check_scores
from fedex_lora.errors import UserError
from fedex_lora.recipe import task as registry
from fedex_lora.recipe.reader import dump_recipe, load_recipe, load_stored_recipe
from fedex_lora.tasks import (
    Metric,
    Task,
    TaskSpec,
    build_task,
    register_task,
    task_kinds,
    task_spec,
)

RECIPE = """
name: x
model: {name: m}
federation: {clients: 2}
data: {path: rows}
task: """
EVERYTHING = """{kind: glue, name: cola, max_length: 128, columns: {}, label_column: label,
  max_new_tokens: 64, generate: false, num_beams: 10, compare: latex, score: generation}
"""
MODULE = """
from fedex_lora.tasks import Task, TaskSpec

class Own(TaskSpec):
    depth: int = 3
    def build(self, labels): ...
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is forgotten after it; this package's own kinds are not."""
    registry.own_specs()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., None]:
    """Makes a package with an entry point, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(package: str, kind: str, module: str = MODULE) -> None:
        (tmp_path / f"{package}.py").write_text(module)
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[fedex_lora.tasks]\n{kind} = {package}:Own\n")
        points.cache_clear()

    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerBase:
    return tokenizer_of(tiny("bert", tmp_path_factory.mktemp("bert")))


class Own(TaskSpec):
    depth: int = 3

    def build(self, labels: Sequence[str] | None) -> Task:
        return whole()


def whole(**parts: Any) -> Task:
    return Task(
        **{
            "name": "own",
            "auto_model": "AutoModel",
            "peft_task_type": None,
            "columns": (),
            "evaluation_splits": ("validation",),
            "primary": "bits",
            "metrics": {"bits": Metric(higher_is_better=False, range=(0.0, 8.0))},
            "check": print,
            "encode": print,
            "collator": print,
            "evaluate": print,
            **parts,
        }
    )


def load(tmp_path: Path, task: str):
    (tmp_path / "r.yaml").write_text(RECIPE + task)
    return load_recipe(tmp_path / "r.yaml")


def refusal(tmp_path: Path, task: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load(tmp_path, task)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_a_recipe_is_read_without_the_large_libraries(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + "{kind: e2e, generate: true}")
    code = f"""
import sys
from pathlib import Path
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.tasks import task_kinds
assert "e2e" in task_kinds() and "fedex_lora.tasks.kinds.e2e" not in sys.modules
load_recipe(Path({str(tmp_path / "r.yaml")!r}))
assert "fedex_lora.tasks.kinds.e2e" in sys.modules
print([m for m in ("torch", "transformers", "datasets", "scipy", "sklearn") if m in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_recipes_of_earlier_runs_have_keys_of_all_kinds(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + EVERYTHING)
    now = load(tmp_path, EVERYTHING)
    assert (
        now == load_stored_recipe(tmp_path / "r.yaml") == load(tmp_path, "{kind: glue, name: cola}")
    )
    assert set(dump_recipe(now).split("task:")[1].split("data:")[0].split()) >= {"name:", "cola"}
    assert "beams" not in dump_recipe(now)


@pytest.mark.parametrize(
    "task, first, last",
    [
        ("{kind: gleu}", "expected one of ", "got 'gleu'; did you mean 'glue'?"),
        ("{max_length: 9}", "missing; expected one of ", "token-classification"),
        ("{kind: [glue]}", "expected one of ", "got ['glue']; did you mean 'glue'?"),
    ],
)
def test_unknown_kinds(tmp_path, task, first, last):
    (line,) = refusal(tmp_path, task)
    assert line.startswith("r.yaml:") and f": task.kind: {first}causal-lm, " in line
    assert line.endswith(last)


def test_all_problems_of_a_block_are_told_together(tmp_path):
    task = "\n  kind: glue\n  max_length: 1\n  generate: true\n  lable: x\n"
    assert sorted(refusal(tmp_path, task)) == [
        "r.yaml:10: task.lable: unknown key; known: kind, max_length, evaluation_max_length, "
        "columns, name",
        "r.yaml:6: task.name: missing; a task of kind glue needs it",
        "r.yaml:8: task.max_length: expected a whole number of at least 4, got 1",
        "r.yaml:9: task.generate: a task of kind glue does not use it",
    ]


def test_a_task_of_ones_own_is_registered_by_a_call(tmp_path):
    register_task("own", Own)
    register_task("own", Own)  # the same once more, as when a module is read again
    assert "own" in task_kinds()
    spec = load(tmp_path, "{kind: own, depth: 5, max_length: 9}").task
    assert isinstance(spec, Own) and (spec.depth, spec.max_length) == (5, 9)
    assert build_task(spec).primary == "bits"
    again = load(tmp_path, "{kind: own, depth: 5, max_length: 9}")
    assert "depth: 5" in dump_recipe(again)
    assert refusal(tmp_path, "{kind: own, dept: 5}") == [
        "r.yaml:6: task.dept: unknown key; did you mean 'depth'?"
    ]
    assert refusal(tmp_path, "{kind: glue, name: cola, depth: 5}") == [
        "r.yaml:6: task.depth: a task of kind glue does not use it"
    ]


NEEDED = {
    "glue": {"name": "cola"},
    "commonsense": {"name": "piqa"},
    "instruction": {"prompt": "{question}", "response": "{answer}"},
    "seq2seq": {"prompt": "{question}", "response": "{answer}"},
    "token-classification": {"labels": ["x", "y"]},
}


@pytest.mark.parametrize("kind", task_kinds())
def test_what_makes_batches_can_be_given_to_other_processes(kind, tokenizer):
    """Those that load batches are given it pickled, but where they are forked."""
    task = build_task(task_spec(kind=kind, **NEEDED.get(kind, {})), ["x", "y"])
    collate = task.collator(tokenizer)
    again = pickle.loads(pickle.dumps(collate))
    assert getattr(again, "func", again) is getattr(collate, "func", collate)


def test_two_tasks_of_one_name_are_refused(tmp_path, install):
    register_task("own", Own)
    other = type("Own", (Own,), {"__module__": "elsewhere"})
    with pytest.raises(UserError, match=r"'own': registered twice, by .*test_registry and else"):
        register_task("own", other)
    with pytest.raises(UserError, match=r"registered twice, by fedex_lora.tasks.kinds.glue and"):
        register_task("glue", Own)
    install("first_tasks", "theirs")
    install("second_tasks", "theirs")
    (line,) = refusal(tmp_path, "{kind: theirs}")
    assert "registered twice, by" in line
    assert "first_tasks (first_tasks:Own)" in line and "second_tasks (" in line
    with pytest.raises(UserError, match=r"'theirs': .*by \w+_tasks \(\w+:Own\) and .*registry"):
        register_task("theirs", Own)
    install("third_tasks", "cola")
    install("fourth_tasks", "glue")
    assert "by fedex-lora and fourth_tasks" in refusal(tmp_path, "{kind: glue, name: cola}")[0]
    assert load(tmp_path, "{kind: causal-lm}").task.kind == "causal-lm"  # others are as they were


def test_a_task_of_an_installed_package_is_imported_when_it_is_asked_for(tmp_path, install):
    install("their_tasks", "their-kind")
    assert "their-kind" in task_kinds() and "their_tasks" not in sys.modules
    spec = load(tmp_path, "{kind: their-kind, depth: 4}").task
    assert type(spec).__module__ == "their_tasks" and spec.depth == 4  # type: ignore[attr-defined]


def test_a_package_that_cannot_be_imported_is_named(tmp_path, install):
    install("broken_tasks", "broken", "import no_such_module")
    (line,) = refusal(tmp_path, "{kind: broken}")
    assert "task.kind: task 'broken': broken_tasks (broken_tasks:Own) cannot be imported" in line
    assert "no_such_module" in line
    install("empty_tasks", "empty", "Own = 3")
    assert "3 is no TaskSpec" in refusal(tmp_path, "{kind: empty}")[0]


def test_what_a_task_lacks_is_named():
    with pytest.raises(UserError, match=r"'own': Bare lacks `build\(self, labels\)`"):
        register_task("own", type("Bare", (TaskSpec,), {}))
    with pytest.raises(UserError, match=r"'own': .* is no TaskSpec"):
        register_task("own", dict)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'own': check is 3; expected a function"):
        whole(check=3)
    for metrics in ({}, {"loss": Metric()}, {"bits": (0.0, 8.0)}, ["bits"], None):
        with pytest.raises(UserError, match=r"'own': metrics lacks .*\{'bits': Metric\("):
            whole(metrics=metrics)

    class Partial(TaskSpec):
        def build(self, labels: Sequence[str] | None) -> Any:
            return Task(name="p", check=print, encode=print) if self.max_length > 9 else None  # type: ignore[call-arg]

    register_task("partial", Partial)
    with pytest.raises(UserError, match=r"'partial': .*missing .*'collator', and 'evaluate'"):
        build_task(task_spec(kind="partial", max_length=10))
    with pytest.raises(UserError, match="'partial': build gave None; expected"):
        build_task(task_spec(kind="partial", max_length=9))


@pytest.mark.parametrize("scores", [None, {}, {"loss": 1.0}, {"bits": "1"}, {"bits": [1.0]}])
def test_what_evaluate_gives_in_place_of_numbers_is_named(scores):
    class Odd(TaskSpec):
        def build(self, labels: Sequence[str] | None) -> Task:
            return whole(evaluate=lambda *args: scores)

    register_task("odd", Odd)
    with pytest.raises(UserError, match=r"'own': evaluate gave .*; expected numbers by .* bits"):
        build_task(task_spec(kind="odd")).evaluate(None, None, None, 1)  # type: ignore[arg-type]


def test_numbers_of_any_names_and_types_are_taken_as_they_are():
    class Free(TaskSpec):
        def build(self, labels: Sequence[str] | None) -> Task:
            return whole(evaluate=lambda *args: {"words": 3, "bits": np.float32(0.5)})

    register_task("free", Free)
    scores = build_task(task_spec(kind="free")).evaluate(None, None, None, 1)  # type: ignore[arg-type]
    assert scores == {"words": 3.0, "bits": 0.5} and {type(v) for v in scores.values()} == {float}
    assert list(scores) == ["words", "bits"]


@pytest.mark.parametrize("kind", ["glue", "causal-lm", "e2e", "math", "commonsense"])
@pytest.mark.parametrize("generate", [False, True])
def test_each_metric_says_which_way_is_better(kind, generate):
    name = {"name": "stsb"} if kind == "glue" else {}
    able = kind not in ("glue", "causal-lm")
    task = build_task(task_spec(kind=kind, **name, **({"generate": generate} if able else {})))
    lower = {name for name, metric in task.metrics.items() if not metric.higher_is_better}
    assert lower == {"loss", "perplexity"} & set(task.metrics) and "loss" in lower
    assert task.primary == next(iter(task.metrics))
    assert task.higher_is_better is (kind == "glue" or (able and generate))


def test_scores_out_of_the_range_of_a_task_s_own_metric_are_refused():
    assert check_scores({"bits": 8.0}, whole()) == {"bits": 8.0}
    with pytest.raises(UserError, match="its score bits is 9; expected 0 to 8"):
        check_scores({"bits": 9.0}, whole())
    assert check_scores({"bits": 1.0, "words": 1e9}, whole())["words"] == 1e9  # not declared
    with pytest.raises(UserError, match="its score words is inf; expected a finite number"):
        check_scores({"bits": 1.0, "words": float("inf")}, whole())
    with pytest.raises(UserError, match="its scores lack bits"):
        check_scores({"accuracy": 1.0}, whole())
