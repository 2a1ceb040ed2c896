"""GGUF files of a merged model and of a PEFT adapter, read back and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import quants
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedex_lora.disk import reason, replace_atomic
from fedex_lora.errors import DataError, StorageError
from fedex_lora.merge.checkpoint import checkpoint
from fedex_lora.merge.llama_cpp.architecture import architecture, describe
from fedex_lora.merge.llama_cpp.vocabulary import add_vocabulary
from fedex_lora.model.config import WEIGHTS, read_config
from fedex_lora.model.keys import NAMES, PREFIX, adapter_keys
from fedex_lora.model.load import locate
from fedex_lora.model.plain import configured, unsupported

Kind = Literal["f32", "f16", "bf16"]
Tensors = Callable[[], Iterable[tuple[str, Tensor]]]  # read anew each time: all may be too many
_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


@dataclass(frozen=True)
class Written:
    """A GGUF file.

    Attributes:
        tensors: How many it holds; all were read back.
        rounding: ‖W − stored‖_F / ‖W‖_F over all of them.
    """

    path: Path
    tensors: int
    rounding: float


def write_model(folder: Path, out: Path, kind: Kind = "bf16", pre: str | None = None) -> Written:
    """Writes a merged model, e.g. of `fedex-lora export --as model`, one tensor at a time.

    Args:
        folder: With config.json, safetensors and tokenizer.json.
        kind: Of matrices; vectors are float32.
        pre: As of `add_vocabulary`.

    Raises:
        UserError: Of another architecture, or a tensor for which llama.cpp has no name.
    """
    config = _config(str(folder))
    made, stored = architecture(config), checkpoint(folder)
    tied = getattr(config, "tie_word_embeddings", False)
    names = {name: made.tensor(name) for name in stored if not (tied and name == "lm_head.weight")}
    writer = gguf.GGUFWriter(None, made.name, use_temp_file=True)
    factors = describe(writer, made, folder.resolve().name)
    writer.add_file_type(_TYPES[kind][1])
    add_vocabulary(writer, folder, config.vocab_size, pre)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if factors is not None:
            yield "rope_freqs.weight", factors
        for name, to in names.items():
            yield to, made.rows(name, stored[name].read())

    return _written(writer, tensors, out, kind)


def write_adapter(folder: Path, out: Path, base: str, kind: Kind = "f32") -> Written:
    """Writes a PEFT adapter, e.g. of `fedex-lora export`, for `llama-cli --lora`.

    Args:
        base: The base model: a folder or hub id, of which the config is read.

    Raises:
        UserError: The adapter trains more than layers that llama.cpp adapts, or is of another
            architecture.
    """
    try:
        config, stored = read_config(folder), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: no PEFT adapter: {reason(error)}") from None
    if refused := unsupported(config):
        raise DataError(f"{folder}: {refused}; GGUF has plain adapters alone")
    made, tensors = architecture(_config(base, "; name its base model with `base`")), {}
    keys = adapter_keys(stored, str(folder)).stored
    found = {key.removeprefix(PREFIX): stored[name] for key, name in keys.items()}
    first, second = (f".{name}" for name in NAMES[False])
    for name in [key.removesuffix(first) for key in found if key.endswith(first)]:
        a, b = found.pop(name + first), found.pop(name + second)
        scale = configured(config, name, a.shape[0])[1]
        to = made.tensor(f"{name}.weight")
        tensors[f"{to}.lora_a"] = a.float()
        # the scale goes into B: llama.cpp takes adapter.lora.alpha / r, which is 1 here
        tensors[f"{to}.lora_b"] = made.rows(f"{name}.weight", b.float()) * scale
    if found:
        raise DataError(
            f"{folder}: {min(found)}: GGUF has factors of linear layers alone; merge the adapter "
            "into its base, and write that"
        )
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a")}
    rank = max(ranks)
    if len(ranks) > 1:  # one alpha for all layers: zeros make up for the ranks
        tensors = {name: _padded(name, tensor, rank) for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(None, made.name, use_temp_file=True)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_name(folder.resolve().name)
    return _written(writer, lambda: iter(tensors.items()), out, kind)


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    a = name.endswith("lora_a")
    more = rank - tensor.shape[0 if a else 1]
    return torch.nn.functional.pad(tensor, (0, 0, 0, more) if a else (0, more))


def _config(name: str, remedy: str = "") -> Any:
    from transformers import AutoConfig  # noqa: PLC0415 (takes seconds)

    try:
        return AutoConfig.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{name}: its config cannot be read{remedy}: {why}") from None


def _written(writer: gguf.GGUFWriter, tensors: Tensors, out: Path, kind: Kind) -> Written:
    """The file, whose values are those of `tensors` rounded once: it is read back whole."""
    if out.exists():
        raise StorageError(f"{out}: is there already; name another file with `out`")
    lost = size = 0.0

    def write(new: Path) -> None:
        nonlocal lost, size
        for name, tensor in tensors():
            values, to = _stored(name, tensor.float().numpy(), kind)
            writer.add_tensor(name, values, raw_dtype=to)
        writer.write_header_to_file(new)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        lost, size = _compared(new, tensors(), kind)

    replace_atomic(out, write)
    return Written(out, len(list(tensors())), (lost / size) ** 0.5 if size else 0.0)


def _stored(name: str, values: Any, kind: Kind) -> tuple[Any, gguf.GGMLQuantizationType]:
    to = _TYPES[kind][0] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    if to == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > 65504:
        raise DataError(f"{name}: has entries that float16 does not hold; write bf16 or f32")
    return quants.quantize(np.ascontiguousarray(values), to), to


def _compared(path: Path, tensors: Iterable[tuple[str, Tensor]], kind: Kind) -> tuple[float, float]:
    """Σ‖W − read‖² and Σ‖W‖²; every tensor is there, as it was rounded."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    lost = size = 0.0
    for name, tensor in tensors:
        values = tensor.float().numpy()
        found = there.pop(name)
        read = quants.dequantize(found.data, found.tensor_type).reshape(values.shape)
        expected = quants.dequantize(*_stored(name, values, kind)).reshape(values.shape)
        if not np.array_equal(read, expected):
            raise StorageError(f"{path}: {name} reads back as other values; write it again")
        lost += float(np.square(read - values, dtype=np.float64).sum())
        size += float(np.square(values, dtype=np.float64).sum())
    if there:
        raise StorageError(f"{path}: holds {min(there)}, which was not written; write it again")
    return lost, size
