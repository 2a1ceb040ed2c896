"""The weighted mean (or sum) of adapters' updates added to a full model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedex_lora.disk import new_directory
from fedex_lora.merge.checkpoint import INDEX
from fedex_lora.merge.opening import open_target
from fedex_lora.merge.plan import Plan
from fedex_lora.merge.room import check_memory, check_place
from fedex_lora.merge.target import Target
from fedex_lora.merge.tensor_file import TensorFile, tensor_file
from fedex_lora.merge.tokens import of_tokens
from fedex_lora.merge.values import Values

# weights in other forms, and what is written anew
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece")


@dataclass(frozen=True)
class Written:
    """A full model with the merged update in it.

    Attributes:
        auto_model: The class in transformers to load it with.
        layers: How many layers were changed.
        missed: What a cut to a rank lost of the update: relative, in Frobenius norm.
        rounding: ‖cast(W) − W‖_F / ‖W‖_F over the changed weights W = W₀ + Σ wᵢsᵢBᵢAᵢ.
        notes: What the user should know.
    """

    auto_model: str
    layers: int
    missed: float
    rounding: float
    notes: Sequence[str]


def merge_into_base(
    plan: Plan,
    model: str,
    out: Path,
    rank: int | None = None,
    error: float = 0.0,
    dtype: torch.dtype | None = None,
    quantised: str | None = None,
) -> Written:
    """Writes `model` with the weighted mean of the adapters' updates in its weights.

    The sum is taken in float32 (float64 for a float64 model) and rounded once. Shards and tensors
    keep their names; one tensor is in memory at a time (of a mixture's experts those that one
    parameter is made of). A weight that was tied to another one and is changed gets its own tensor,
    and `tie_word_embeddings` becomes false.

    Args:
        model: A folder or hub id.
        rank: The largest rank of a layer's update; `error`: see `merge.write.Options`.
        dtype: Of all floating tensors; by default that of each in `model`.
        quantised: How the base was quantised when the adapters were trained (of
            `quantised.KINDS`): its linear layers get the values that they had then.

    Raises:
        UserError: The adapters do not fit the model; `out` is in use, lies in an input or cannot
            be written; too little disk or memory.
    """
    trained = {key: plan.saved_shape(key) for key in plan.heads if not of_tokens(key)}
    copies = {key: plan.saved_shape(key) for key in plan.copies}
    target = open_target(model, plan.adapters[0], plan.layers, trained, copies)
    values = Values(plan, target, rank, error, dtype, quantised)
    inputs = [target.folder, *(adapter.folder for adapter in plan.adapters)]
    check_place(out, inputs, values.size())
    check_memory(values.largest())
    with new_directory(out, "the merged model", "merge again") as new:
        _copy_files(target, new)
        notes = _copy_tokenizer(plan, new) if target.enlarged else []
        shards, total = values.shards(), 0
        for file, names in shards.items():
            with tensor_file(new / file, names) as made:
                total += _write_tensors(values, made, names)
        if (values.target.folder / INDEX).is_file() and INDEX not in shards:
            where = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_config(target, new, values, dtype)
    if values.untied:
        notes.append(f"{', '.join(values.untied)} shared one weight; each has its own now")
    packed = {s.packed.four_bit for s in target.stored.values() if s.packed}
    if packed:
        notes.append("the model was quantised; its weights are written as it multiplied with them")
    if False in packed:
        notes.append("its 8-bit layers rounded their inputs too, which the written model does not")
    return Written(target.auto_model, len(plan.layers), *values.losses(), notes)


def _write_tensors(values: Values, made: TensorFile, names: Sequence[str]) -> int:
    total = 0
    for name in names:
        tensor = values.value(name)
        made.add(name, tensor)
        total += tensor.nbytes
    return total


def _copy_files(target: Target, new: Path) -> None:
    """Config, tokenizer, licence and the like; no weights, and no card that is about another."""
    for file in sorted(target.folder.iterdir()):
        wanted = file.suffix not in _NOT_COPIED and not file.name.endswith(".index.json")
        if file.is_file() and wanted and not file.name.startswith((".", "README")):
            shutil.copyfile(file, new / file.name)


def _copy_tokenizer(plan: Plan, new: Path) -> list[str]:
    """The tokenizer that the adapters brought, for a vocabulary that is theirs."""
    chosen = next((a for a in plan.copies.values() if a is not None), None)
    for adapter in [*([chosen] if chosen else []), *plan.adapters]:
        files = [f for f in sorted(adapter.folder.iterdir()) if f.name.startswith(_TOKENIZER)]
        if files:
            for file in files:
                shutil.copyfile(file, new / file.name)
            return [f"the vocabulary is the adapters'; the tokenizer is that of {adapter.name}"]
    return [
        "the vocabulary is the adapters', and no tokenizer lies beside them: the model's own is "
        "there; put that in its place with which they were trained"
    ]


def _write_config(target: Target, new: Path, values: Values, dtype: torch.dtype | None) -> None:
    """The model's config with what has changed; else it is left byte for byte."""
    file = new / "config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    text = target.config.get_text_config()
    within = [k for k in target.config.sub_configs if getattr(target.config, k, None) is text]
    parts = [own, *(own[key] for key in within if isinstance(own.get(key), dict))]
    changed = json.dumps(own)
    if values.untied:
        for part in parts:
            part["tie_word_embeddings"] = False
    if target.enlarged:
        for part in parts:
            if "vocab_size" in part or part is parts[-1]:
                part["vocab_size"] = text.vocab_size
    if target.relabelled:
        own["id2label"] = {str(i): name for i, name in target.config.id2label.items()}
        own["label2id"] = target.config.label2id
    if dtype:
        for part in parts:
            key = "torch_dtype" if "torch_dtype" in part else "dtype"
            part[key] = str(dtype).removeprefix("torch.")
    if any(stored.packed for stored in target.stored.values()):
        own.pop("quantization_config", None)
    if set(values.added.values()) - set(values.untied) or not own.get("architectures"):
        own["architectures"] = [type(target.net).__name__]
    if json.dumps(own) != changed:
        file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
