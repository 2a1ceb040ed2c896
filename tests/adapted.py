"""Adapted tiny models for tests, and the dense oracle for their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import TEXT, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta
from fedex_lora.model.adapted import AdaptedModel, load_model
from fedex_lora.model.load import IMAGES
from fedex_lora.recipe import LoraSpec, ModelSpec

CLASSIFY = {
    "auto_model": "AutoModelForSequenceClassification",
    "peft_task_type": "SEQ_CLS",
    "model_kwargs": {"num_labels": 3},
}
SEE = CLASSIFY | {
    "auto_model": "AutoModelForImageClassification",
    "peft_task_type": None,
    "processor": IMAGES,
}
GENERATE = {"auto_model": "AutoModelForCausalLM", "peft_task_type": "CAUSAL_LM", "model_kwargs": {}}


@dataclass(frozen=True)
class Case:
    """A tiny architecture, how it is adapted, and for what."""

    kind: str
    lora: dict[str, Any]
    task: dict[str, Any]

    def load(self, path: Path, *, seed: int = 0, lora: Any = (), **model: Any) -> AdaptedModel:
        spec = ModelSpec(name=str(path), device="cpu", **model)
        return load_model(spec, LoraSpec(**self.lora | dict(lora)), seed=seed, **self.task)


_R = {"r": 3, "lora_alpha": 5}
_RS = {"r": 3, "lora_alpha": 5, "use_rslora": True}
_PATTERNS = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 7}}
CASES = {
    "roberta": Case("roberta", _R | {"target_modules": ["query", "value"]}, CLASSIFY),
    "bert-embedding": Case(
        "bert", _R | {"target_modules": ["word_embeddings", "intermediate.dense"]}, CLASSIFY
    ),
    "gpt2": Case("gpt2", _R | {"target_modules": ["c_attn", "c_fc"]}, CLASSIFY),
    "gpt2-lm": Case("gpt2", _RS | {"target_modules": ["c_attn", "mlp.c_proj"]}, GENERATE),
    "llama": Case("llama", _R | _PATTERNS | {"target_modules": ["k_proj", "down_proj"]}, GENERATE),
    "llama-embedding": Case("llama", _R | {"target_modules": ["embed_tokens", "v_proj"]}, GENERATE),
    "mistral": Case("mistral", _RS | {"target_modules": "all-linear"}, CLASSIFY),
    "vit": Case("vit", _R | {"target_modules": ["q_proj", "fc1"]}, SEE),
    "gemma2": Case("gemma2", _R | {"target_modules": "all-linear"}, GENERATE),
}


def batch(model: AdaptedModel) -> dict[str, Tensor]:
    """Padded sentences; the causal models' labels are their inputs. Or images."""
    if hasattr(model.tokenizer, "image_mean"):
        g = torch.Generator().manual_seed(4)
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=g)}
    inputs = dict(model.tokenizer(TEXT, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    return inputs


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model says where there is no padding, in evaluation mode, as float32."""
    module.eval()
    with torch.no_grad():
        out = module(**inputs).logits.float()
    return out[inputs["attention_mask"].bool()] if out.dim() == 3 else out


def random_state(model: AdaptedModel, seed: int = 1, rank: int | None = None) -> AdapterState:
    """Factors away from zero, and a head away from its start."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, site in model.layers.items():
        r = rank or site.rank
        a, b = torch.randn(r, site.inp, generator=g), torch.randn(site.out, r, generator=g)
        layers[name] = Factors(0.2 * a, 0.2 * b, site.at_rank(r).scale)
    head = model.read().head
    noise = {n: 0.1 * torch.randn(t.shape, generator=g) for n, t in head.items()}
    return AdapterState(layers, {n: t + noise[n] for n, t in head.items()})


def increments(model: AdaptedModel, seed: int = 2) -> dict[str, Delta | None]:
    """By turns a low-rank increment, a dense one and none."""
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Delta | None] = {}
    for i, (name, s) in enumerate(model.layers.items()):
        left, right = torch.randn(s.out, 2, generator=g), torch.randn(2, s.inp, generator=g)
        factors = Delta(0.1 * left, right)
        made[name] = (factors, Delta(factors.dense()), None)[i % 3]
    return made


def oracle(
    case: Case,
    path: Path,
    state: AdapterState,
    added: dict[str, Delta | None],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The plain model with float64 W0 + increment + scale·B·A set by hand."""
    auto = getattr(transformers, case.task["auto_model"])
    plain = auto.from_pretrained(path, **case.task["model_kwargs"])
    for name, f in state.layers.items():
        module = plain.get_submodule(name)
        delta = f.scale * f.B.double() @ f.A.double()
        more = added.get(name)
        if more is not None:
            delta += more.to(torch.float64).dense()
        delta = delta.T if isinstance(module, Conv1D | nn.Embedding) else delta
        module.weight.data = (module.weight.data.double() + delta).float()
    for name, tensor in state.head.items():
        plain.get_parameter(name).data = tensor.clone()
    if getattr(plain.config, "pad_token_id", 0) is None:
        plain.config.pad_token_id = plain.config.eos_token_id
    return plain.to(dtype)


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a kind of tiny model to its folder, made once; import it where it is used."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny(kind, tmp_path_factory.mktemp("tiny") / kind)
        return made[kind]

    return get


def assert_equal(left: AdapterState, right: AdapterState) -> None:
    """Bit for bit the same state."""
    assert list(left.layers) == list(right.layers)
    for name, f in left.layers.items():
        g = right.layers[name]
        assert torch.equal(f.A, g.A)
        assert torch.equal(f.B, g.B)
        assert f.scale == g.scale
    assert left.head.keys() == right.head.keys()
    assert all(torch.equal(t, right.head[n]) for n, t in left.head.items())
