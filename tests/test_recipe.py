"""Recipes: what loads, and what is refused and in which words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainingArguments

from fedex_lora.engines.training import training_problems
from fedex_lora.errors import UserError
from fedex_lora.experiments.grid.spec import is_grid
from fedex_lora.recipe import FederationSpec, Recipe
from fedex_lora.recipe.reader import (
    load_recipe,
    load_stored_recipe,
    read_draft,
)

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if not is_grid(path))

MINIMAL = """\
name: tiny
model: {name: m}
task: {kind: glue, name: sst2}
data: {name: nyu-mll/glue, config: sst2}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def refused_line(tmp_path: Path, text: str, *overrides: str) -> str:
    lines = refusal(tmp_path, text, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads_and_has_real_training_names(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert path.stem in recipe.name


def test_there_are_the_promised_recipes() -> None:
    expected = "cola demo instruction mnli mrpc own-files qnli qqp rte sst2 stsb"
    assert {p.stem for p in RECIPES} >= set(expected.split())


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.method.name, recipe.lora.r, recipe.federation.clients) == ("fedex", 8, 3)


def test_empty_blocks_are_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "lora:\ntraining:\n") == load(tmp_path, MINIMAL)


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, number: str) -> None:
    text = f"{MINIMAL}training: {{learning_rate: {number}}}\n"
    assert load(tmp_path, text).training == {"learning_rate": 0.001}
    override = f"training.learning_rate={number}"
    assert load(tmp_path, MINIMAL, override).training == {"learning_rate": 0.001}


def test_overrides_create_blocks_and_replace_values(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, MINIMAL, "federation.partition={kind: dirichlet, alpha: 0.3}", "seed=7",
        "federation.partition.alpha=1", "lora.target_modules=[query, value]",
    )  # fmt: skip
    assert recipe.seed == 7
    assert recipe.federation.partition.alpha == 1
    assert recipe.lora.target_modules == ["query", "value"]


def test_an_override_of_the_data_source_replaces_the_files(tmp_path: Path) -> None:
    data = load(tmp_path, MINIMAL, "data.path=some/folder").data
    assert (data.path, data.name, data.config) == (Path("some/folder"), None, None)
    text = MINIMAL.replace("name: nyu-mll/glue, config: sst2", "clients: [a, b, c]")
    data = load(tmp_path, text, "data.path=eval").data
    assert (data.path, data.clients) == (Path("eval"), [Path("a"), Path("b"), Path("c")])


def test_two_overrides_that_contradict_are_an_error(tmp_path: Path) -> None:
    line = refused_line(tmp_path, MINIMAL, "data.path=a", "data.name=b")
    assert "expected exactly one of name, path" in line


def test_all_problems_are_reported_together_each_with_its_place(tmp_path: Path) -> None:
    text = "seed: 1\nnmae: x\n" + MINIMAL + "lora:\n  r: 0\n  ranl: 3\n"
    lines = refusal(tmp_path, text, "federation.rounds=many", "method.nam=fedit")
    assert lines == [
        "r.yaml:8: lora.r: expected a whole number of at least 1, got 0",
        "r.yaml:9: lora.ranl: unknown key; did you mean 'ranks'?",
        "`set=method.nam=fedit`: method.nam: unknown key; did you mean 'name'?",
        "`set=federation.rounds=many`: federation.rounds: "
        'expected a whole number of at least 1, got "many"',
        "r.yaml:2: nmae: unknown key; did you mean 'name'?",
    ]


WRONG = [
    # text added to the minimal recipe, the whole line of the error
    ("model: {name: m, dtype: float23}", "model.dtype: expected .*; did you mean 'float32'?"),
    ("rounds: 3", "rounds: unknown key; did you mean 'federation.rounds'?"),
    ("xyzzy: 3", "xyzzy: unknown key; known: name, seed, model, .*"),
    ("seed: true", "seed: expected a whole number of at least 0, got true"),
    ("seed: 1.5", "seed: expected a whole number of at least 0, got 1.5"),
    ("name: 3", "name: expected text, got 3; quote it if text is meant"),
    ("name: 2024-01-01", 'name: expected text, got "2024-01-01"; quote it if text is meant'),
    ("training: 3", "training: expected a block of keys, got 3"),
    ("training: {output_dir: x}", "training.output_dir: set by the program"),
    ("training: {seed: 1}", "training.seed: set by the program for each round and client; .*"),
    ("method: {name: fedexx}", "method.name: there is no method 'fedexx'; did you mean 'fedex'?.*"),
    ("method: {name: fedex-svd}", "method.rank: missing; fedex-svd needs the rank .*"),
    ("method: {rank: 3}", "method.rank: fedex does not cut its residual; only fedex-svd .*"),
    ("lora: {use_dora: true}", "lora.use_dora: refused: trains more than A and B, .*"),
    ("lora: {bias: all}", 'lora.bias: expected "none", got "all"; trains more than A and B, .*'),
    ("lora: {init_lora_weights: pissa}", "lora.init_lora_weights: .*change the base weights.*"),
    ("lora: {ranks: [2, 4, 8]}", "lora.ranks: fedex needs equal ranks; these do not: .*flexlora.*"),
    ("lora: {rank_pattern: {q: 0}}", "lora.rank_pattern.q: expected a rank of at least 1"),
    ("federation: {clients_per_round: true}", "federation.clients_per_round: expected .*got true"),
    ("federation: {clients_per_round: 4}", "federation.clients_per_round: expected 1 to 3 .*"),
    ("federation: {clients_per_round: 0}", "federation.clients_per_round: expected 1 to 3 .*"),
    ("federation: {clients_per_round: 0.0}", "federation.clients_per_round: as a fraction .*"),
    ("federation: {clients_per_round: 1.5}", "federation.clients_per_round: as a fraction .*"),
    ("federation: {min_clients: 4}", "federation.min_clients: 4 are more than the 3 clients .*"),
    (
        "federation: {clients: 10, clients_per_round: 0.3, min_clients: 4}",
        "federation.min_clients: 4 are more than the 3 clients of a round",
    ),
    (
        "federation: {partition: {kind: dirichlet}}",
        "federation.partition.alpha: missing; a partition of kind dirichlet needs it",
    ),
    (
        "federation: {partition: {alpha: 1.0}}",
        "federation.partition.alpha: a partition of kind iid does not use it",
    ),
    ("task: {kind: glue}", "task.name: missing; a task of kind glue needs it"),
    ("task: {kind: glue, name: sst-2}", "task.name: expected one of .*; did you mean 'sst2'?"),
    ("task: {kind: glue, name: rte, generate: true}", "task.generate: .* glue does not use it"),
    (
        "task: {kind: glue, name: rte, columns: {sentence: s}}",
        "task.columns.sentence: expected one of sentence1, sentence2, label; did you mean .*",
    ),
    # numbers that are none, and what never ends or never begins
    ("lora: {lora_alpha: .inf}", "lora.lora_alpha: expected a number that is finite, got inf"),
    ("lora: {lora_alpha: .nan}", "lora.lora_alpha: expected a number .*got .*"),
    ("lora: {lora_alpha: 1e30}", "lora.lora_alpha: expected at most 1000000, got 1e.30"),
    ("lora: {lora_alpha: 0}", "lora.lora_alpha: expected a number above 0, got 0"),
    ("lora: {alpha_pattern: {q: .inf}}", "lora.alpha_pattern.q: expected .* finite, got inf"),
    ("lora: {r: 100000}", "lora.r: expected at most 65536, got 100000"),
    ("lora: {rank_pattern: {q: 1000000}}", "lora.rank_pattern.q: expected at most 65536, .*"),
    ("method: {name: fedex-svd, rank: 10000000}", "method.rank: expected at most 65536, .*"),
    ("federation: {server_learning_rate: .inf}", "federation.server_learning_rate: .* got inf"),
    ("federation: {server_learning_rate: .nan}", "federation.server_learning_rate: .*"),
    ("federation: {max_norm: .inf}", "federation.max_norm: expected .* finite, got inf"),
    ("federation: {round_timeout: .inf}", "federation.round_timeout: expected .* got inf"),
    ("federation: {round_timeout: 1e12}", "federation.round_timeout: expected at most .* seconds"),
    (f"federation: {{rounds: {10**30}}}", f"federation.rounds: expected at most .*, got {10**30}"),
    (f"federation: {{clients: {10**30}}}", "federation.clients: expected at most 1000000, .*"),
    ("federation: {partition: {kind: dirichlet, alpha: .inf}}", "federation.partition.alpha: .*"),
    (f"task: {{kind: glue, name: rte, max_length: {10**30}}}", "task.max_length: expected .*"),
    ("training: {learning_rate: .inf}", "training.learning_rate: .* above 0, got inf"),
    ("training: {learning_rate: .nan}", "training.learning_rate: .* above 0, got nan"),
    ("training: {learning_rate: 0}", "training.learning_rate: .* above 0, got 0"),
    ("training: {num_train_epochs: 0}", "training.num_train_epochs: .* above 0 and .*, got 0"),
    ("training: {num_train_epochs: -1}", "training.num_train_epochs: .* above 0 and .*, got -1"),
    ("training: {num_train_epochs: 1.0e+30}", "training.num_train_epochs: .* got 1e.30"),
    ("training: {max_steps: 0}", "training.max_steps: expected .* or -1 .*, got 0"),
    (f"training: {{max_steps: {10**30}}}", f"training.max_steps: .* or -1 .*, got {10**30}"),
    ("training: {per_device_train_batch_size: 2.5}", "training.per_device.*whole .*, got 2.5"),
    ("training: {adam_beta2: 1}", "training.adam_beta2: .* of at least 0 and below 1, got 1"),
    ("training: {weight_decay: -.inf}", "training.weight_decay: .* of at least 0, got -inf"),
    # names from files become folders
    ("data: {clients: [a, b/..]}", "data.clients: '..': a file's name is its client's, .*"),
    ('data: {clients: [a, "b\\nc.csv"]}', "data.clients: 'b.nc': a file's name .*rename the file"),
    ("data: {clients: [a, my ward.csv]}", "data.clients: 'my ward': a file's name .*"),
    (
        "data: {clients: [x/ann.csv, y/Ann.csv, z/bob.csv]}",
        "data.clients: 'ann' and 'Ann' differ in capitals alone; rename one of them",
    ),
    (
        "federation: {clients: 2, names: [ann, ANN]}",
        "federation.names: 'ann' and 'ANN' differ in capitals alone; rename one of them",
    ),
    ("task: {kind: causal-lm, columns: {text: s}}", "task.columns: .* causal-lm does not use it"),
    (
        "task: {kind: e2e, columns: {meaning_representation: m, human_reference: m}}",
        "task.columns: two of them name the same column",
    ),
    (
        "task: {kind: text-classification, text_column: t}",
        "task.labels: missing; list all labels, .*",
    ),
    (
        "task: {kind: text-classification, labels: [a, a]}",
        "task.labels: expected two or more labels, all different",
    ),
    (
        "task: {kind: text-classification, labels: [no, yes]}",
        r"task.labels: expected a list of texts, got \[false, true\]; quote it if text is meant",
    ),
    ("task: {kind: instruction, prompt: p}", "task.response: missing; .*instruction needs it"),
    ("data: {config: x, path: p}", "data.config: only a data set of the hub .* has one"),
    ("data: {train_examples: 5}", "data: expected exactly one of .*, got none"),
    ("model: {name: m, quantisation: nf4}", "model.quantisation: needs `placement: side`; .*"),
    (
        "model: {name: m, quantisation: nf4, placement: side}\nmethod: {name: full}",
        "model.quantisation: full trains the base, so it stays unquantised",
    ),
    ("data: {clients: [a, a]}", "data.clients: expected one or more files, all different"),
    (
        "data: {clients: [a, b]}\nfederation: {clients: 3}",
        "federation.clients: 3, but data.clients lists 2 files; leave it out",
    ),
    (
        "data: {clients: [a, b]}\nfederation: {partition: {kind: iid}}",
        "federation.partition: data.clients already says whose rows are whose",
    ),
    (
        "lora: {ranks: [2, 4]}\nmethod: {name: flexlora}",
        "lora.ranks: expected one rank for each client, got 2 for 3 clients",
    ),
]


@pytest.mark.parametrize(("text", "pattern"), WRONG, ids=[text for text, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line_with_its_place(
    tmp_path: Path, text: str, pattern: str
) -> None:
    blocks = {line.split(":")[0] for line in text.splitlines()}
    kept = [line for line in MINIMAL.splitlines() if line.split(":")[0] not in blocks]
    line = refused_line(tmp_path, "\n".join([*kept, text, ""]))
    place, message = line.split(": ", 1)
    number = int(place.removeprefix("r.yaml:"))
    assert len(kept) < number <= len(kept) + len(text.splitlines())
    assert re.fullmatch(pattern.replace("?", r"\?"), message)


def test_what_one_mistake_leaves_is_checked_as_well(tmp_path: Path) -> None:
    """Each with its place, whichever check finds it."""
    text = MINIMAL + "lora: {r: 0, lora_alpha: .inf}\nseed: x\ntraining: {num_train_epochs: 0}\n"
    asked: list[Recipe] = []

    def further(recipe: Recipe) -> list[tuple[str, str]]:
        asked.append(recipe)
        return [("lora.r", "too much"), ("federation.clients", "too many"), ("", "rows.csv: bad")]

    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_draft(tmp_path / "r.yaml").checked(further).settled()
    assert str(caught.value).replace(f"{tmp_path}/", "").splitlines() == [
        'r.yaml:6: seed: expected a whole number of at least 0, got "x"',
        "r.yaml:5: lora.r: expected a whole number of at least 1, got 0",
        "r.yaml:5: lora.lora_alpha: expected a number that is finite, got inf",
        "r.yaml:7: training.num_train_epochs: expected a number above 0 and at most 1000000, got 0",
        "r.yaml:1: federation.clients: too many",
        "rows.csv: bad",
    ]
    assert len(asked) == 1 and asked[0].lora.r == 8


def _file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def test_a_run_that_was_begun_is_not_held_to_what_came_later(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: nyu-mll/glue, config: sst2", "clients: [a, my ward.csv]")
    text += "training: {num_train_epochs: 0}\n"
    stored = load_stored_recipe(_file(tmp_path, text))
    assert stored.training == {"num_train_epochs": 0} and len(stored.data.clients or []) == 2
    with pytest.raises(UserError, match="my ward"):
        load_recipe(tmp_path / "r.yaml")


SYNTAX = [
    ("name: [a\nmodel: b\n", r"r.yaml:\d+: not valid YAML: .*"),
    ("- a\n", "r.yaml:1: expected a recipe: lines of `key: value`"),
    ("", "r.yaml:1: expected a recipe: lines of `key: value`"),
    ("name: &a x\ntask: *a\n", r"r.yaml:2: not valid YAML: aliases \(\*name\) are not used here"),
    ("name: !!python/name:os.system\n", "r.yaml:1: not valid YAML: could not determine a .*"),
    ("name: 2024-13-45\n", "r.yaml: not valid YAML: month must be in 1..12"),
    ("name: \x00\n", "r.yaml: not valid YAML: .*"),
]


@pytest.mark.parametrize(("text", "pattern"), SYNTAX)
def test_what_is_not_yaml_is_a_clear_error(tmp_path: Path, text: str, pattern: str) -> None:
    assert re.match(pattern, refusal(tmp_path, text)[0])


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    line = refused_line(tmp_path, MINIMAL + "lora:\n  r: 2\n  r: 3\n")
    assert line == "r.yaml:7: lora.r: given twice; the first is at r.yaml:6"


def test_a_file_that_is_absent_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as UTF-8 text"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="not readable"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("model..name=x", "expected KEY=VALUE"),
        ("name.first=x", "name is a value, not a block of keys"),
        ("model={name: [", "not valid YAML"),
        ("modle.name=x", "modle: unknown key; did you mean 'model'?"),
    ],
)
def test_a_bad_override_names_itself(tmp_path: Path, override: str, message: str) -> None:
    line = refused_line(tmp_path, MINIMAL, override)
    assert line.startswith(f"`set={override}`: {message}")


def test_a_file_for_each_client_counts_the_clients(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: nyu-mll/glue, config: sst2", "clients: [a, b]")
    recipe = load(tmp_path, text + "federation: {rounds: 2}\n")
    assert recipe.federation.clients == 2
    ranks = load(tmp_path, text, "lora.ranks=[2, 4]", "method.name=fedex-hetero").lora.ranks
    assert ranks == [2, 4]


def test_lora_with_full_fine_tuning_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path, MINIMAL, "method.name=full")
    assert caplog.messages == []
    load(tmp_path, MINIMAL + "lora: {r: 2}\n", "method.name=full")
    assert len(caplog.messages) == 1
    assert ":5: lora: full trains all parameters; this block is not used" in caplog.messages[0]


def test_values_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValidationError, match="clients_per_round: expected 1 to 2"):
        FederationSpec(clients=2, clients_per_round=3)


@pytest.mark.parametrize(
    ("clients_per_round", "sampled"), [("all", 10), (4, 4), (0.25, 2), (0.01, 1), (1.0, 10)]
)
def test_clients_of_a_round(clients_per_round: Any, sampled: int) -> None:
    assert FederationSpec(clients=10, clients_per_round=clients_per_round).sampled == sampled


def test_unknown_training_keys_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "training:\n  lerning_rate: 1\n")
    with pytest.raises(UserError) as caught:
        draft = read_draft(path, ["training.optm=x"])
        draft.checked(lambda r: training_problems(r.training)).settled()
    assert str(caught.value).splitlines() == [
        f"{path}:6: training.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "`set=training.optm=x`: training.optm: unknown key; did you mean 'optim'?",
    ]
