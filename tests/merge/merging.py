# pyright: reportAttributeAccessIssue=false
"""Adapters of tiny models as PEFT saves them, and the dense float64 oracle of their merge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from commands import Command
from peft.tuners.lora import LoraLayer
from tiny import TEXT, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import merge_adapters

LM = ("AutoModelForCausalLM", "CAUSAL_LM")
CLS = ("AutoModelForSequenceClassification", "SEQ_CLS")


CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    """A tiny architecture, its class, and the configs of the adapters to be merged."""

    kind: str
    auto: str
    configs: list[dict[str, Any]]


def _case(kind: str, task: tuple[str, str], *configs: dict[str, Any], **common: Any) -> Case:
    return Case(kind, task[0], [{"task_type": task[1], **common, **c} for c in configs])


_RS = {"r": 2, "lora_alpha": 3, "use_rslora": True}
_PATTERNS = {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"layers.1.mlp.down_proj": 7}}
CASES = {
    "llama": _case(
        "llama",
        LM,
        {"r": 3, "lora_alpha": 5} | _PATTERNS,
        _RS,
        {"r": 4, "lora_alpha": 1},
        target_modules=["k_proj", "down_proj", "q_proj"],
    ),
    "gpt2": _case(
        "gpt2",
        LM,
        {"r": 3, "lora_alpha": 5},
        _RS | {"rank_pattern": {"c_attn": 3}},
        target_modules=["c_attn", "mlp.c_proj", "attn.c_proj"],
        fan_in_fan_out=True,
    ),
    "bert": _case(
        "bert",
        CLS,
        {"r": 3, "lora_alpha": 5},
        _RS,
        target_modules=["word_embeddings", "intermediate.dense", "query"],
    ),
    "llama-embeddings": _case(
        "llama", LM, {"r": 3}, _RS, target_modules=["embed_tokens", "lm_head", "v_proj"]
    ),
}
WEIGHTS = [3.0, 1.0, 2.0]


@dataclass(frozen=True)
class Saved:
    """An adapter on disk and what is in it: (A, B, scale) by layer, the head by parameter."""

    folder: Path
    factors: dict[str, tuple[Tensor, Tensor, float]]
    head: dict[str, Tensor]


def plain(base: Path, auto: str) -> Any:
    model = getattr(transformers, auto).from_pretrained(base, num_labels=3)
    model.config.pad_token_id = model.config.pad_token_id or 0
    return model.eval()


def save(base: Path, auto: str, folder: Path, seed: int, **config: Any) -> Saved:
    """An adapter with random factors and a random head, saved by PEFT."""
    model = peft.get_peft_model(plain(base, auto), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            p.data = 0.3 * torch.randn(p.shape, generator=g)
    model.save_pretrained(folder)
    factors, head = {}, {}
    for name, m in model.base_model.model.named_modules():
        if isinstance(m, LoraLayer):
            a = m.lora_embedding_A or {n: x.weight for n, x in m.lora_A.items()}
            b = m.lora_embedding_B or {n: x.weight for n, x in m.lora_B.items()}
            factors[name] = (a["default"].data, b["default"].data, m.scaling["default"])
    for name, p in model.base_model.model.named_parameters():
        if ".modules_to_save.default." in name:
            head[name.replace(".modules_to_save.default", "")] = p.data
    return Saved(folder, factors, head)


def saved(case: Case, base: Path, folder: Path) -> list[Saved]:
    return [
        save(base, case.auto, folder / f"a{i}", seed=i, **config)
        for i, config in enumerate(case.configs)
    ]


def update(adapters: Sequence[Saved], weights: Sequence[float], site: str) -> Tensor:
    """Σ wᵢ·sᵢ·BᵢAᵢ in float64, out × in."""
    parts = [(*a.factors[site], w / sum(weights)) for a, w in zip(adapters, weights)]
    return sum(w * s * b.double() @ a.double() for a, b, s, w in parts)  # type: ignore[return-value]


def oracle(base: Path, case: Case, adapters: Sequence[Saved], weights: Sequence[float]) -> Any:
    """The plain model in float64 with W + ΔW set by hand; tied embeddings are separated."""
    model = plain(base, case.auto).double()
    for site in adapters[0].factors:
        module = model.get_submodule(site)
        delta = update(adapters, weights, site)
        delta = delta.T if isinstance(module, Conv1D | nn.Embedding) else delta
        module.weight = nn.Parameter(module.weight.data + delta)
    for name in adapters[0].head:
        parts = [w / sum(weights) * a.head[name].double() for a, w in zip(adapters, weights)]
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(sum(parts)))
    return model


def logits(model: Any, base: Path) -> Tensor:
    """What a model says in float64, where there is no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = dict(tokenizer(TEXT, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.double().eval()(**inputs).logits
    return out[inputs["attention_mask"].bool()] if out.dim() == 3 else out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a kind of tiny model to its folder, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny(kind, tmp_path_factory.mktemp("tiny") / kind)
        return made[kind]

    return get


@pytest.fixture
def command(command: Command) -> Command:
    """Runs `fedex-lora merge`; returns (exit code, output, errors)."""
    return partial(command, "merge")


def merge(
    folders: Sequence[Path], out: Path, weights: list[float] | None = None, **options: Any
) -> Any:
    """Merges adapters on disk, by a strict plan."""
    plan = make_plan([open_adapter(str(f)) for f in folders], weights, True, **options)
    return merge_adapters(plan, out)


def edit(folder: Path, **fields: Any) -> None:
    """Sets fields of an adapter's config."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.fixture
def bert(base: Any, tmp_path: Path) -> list[Path]:
    """Two adapters with a head, on BERT with an adapted embedding."""
    case = CASES["bert"]
    return [a.folder for a in saved(case, base("bert"), tmp_path)]
