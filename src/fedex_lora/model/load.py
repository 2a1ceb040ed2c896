"""From a recipe's `model:` block to a plain transformers model and its tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from fedex_lora.disk import stands_for
from fedex_lora.errors import EXTRAS, RecipeError, check_installed, missing
from fedex_lora.recipe import ModelSpec

# what transformers and safetensors raise for a folder, name or file that is no usable model
_NO_MODEL = (OSError, ValueError, RuntimeError, ImportError, LookupError, SafetensorError)
_NO_MODEL += (TypeError, AttributeError, ArithmeticError, AssertionError, StrictDataclassError)


TOKENIZER, IMAGES = "AutoTokenizer", "AutoImageProcessor"
_FILES = {TOKENIZER: "the tokenizer's files", IMAGES: "preprocessor_config.json"}


@dataclass(frozen=True)
class Base:
    """A plain pretrained model.

    Attributes:
        model: The transformers model, in evaluation mode, on its device; or a module of the user's.
        tokenizer: Its tokenizer, which has a padding token; or its image processor. None of a
            module of the user's.
        where: Local folder or hub id that it came from; None of a module of the user's.
        missing: Parameters that the checkpoint lacks; they were initialised from the seed.
        use_cache: The config's own `use_cache`, which training switches off.
    """

    model: Any
    tokenizer: Any
    where: str | None
    missing: frozenset[str]
    use_cache: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        own = getattr(self.model, "dtype", None)
        return own if isinstance(own, torch.dtype) else next(self.model.parameters()).dtype


def load_base(
    spec: ModelSpec,
    auto_model: str,
    model_kwargs: dict[str, Any],
    seed: int,
    keep: list[str],
    processor: str = TOKENIZER,
) -> Base:
    """Loads model and tokenizer.

    Args:
        spec: The recipe's block.
        auto_model: Name of a transformers Auto class, e.g. "AutoModelForSequenceClassification".
        model_kwargs: Passed to its `from_pretrained`, e.g. `{"num_labels": 3}`.
        seed: Of the parameters that the checkpoint lacks; nothing else influences them.
        keep: Names of modules that stay unquantised because they are trained.
        processor: Name of the Auto class of its tokenizer, or what it has in place of it.

    Raises:
        UserError: If there is no such model, or it has no tokenizer (processor).
    """
    where = locate(spec.name)
    device = pick_device(spec.device)
    kwargs = {"dtype": getattr(torch, spec.dtype), **_quantisation(spec, device, keep)}
    kwargs |= model_kwargs
    hub = {"revision": spec.revision} if spec.revision else {}
    try:
        with quiet(), seeded(seed):
            tokenizer = _processor(where, processor, hub)
            model, info = getattr(transformers, auto_model).from_pretrained(
                where, **hub, **kwargs, output_loading_info=True
            )
    except _NO_MODEL as error:
        raise RecipeError(_cannot_load(spec.name, where, auto_model, processor, error)) from error
    _check_found(model, info["missing_keys"], spec.name)
    if spec.quantisation is None:
        model.to(device)
    for module in model.modules():
        # bitsandbytes on some CPUs repacks, and rounds, the weight at the first evaluation
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if processor != IMAGES:
        inner = text_tokenizer(tokenizer)
        had_none = inner.pad_token_id is None
        with_padding(inner)
        if had_none or getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = inner.pad_token_id
    use_cache = bool(getattr(model.config, "use_cache", False))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return Base(model, tokenizer, where, frozenset(info["missing_keys"]), use_cache)


def text_tokenizer(processor: Any) -> Any:
    """The tokenizer, also of a processor of images and texts."""
    return getattr(processor, "tokenizer", processor)


def load_processor(spec: ModelSpec, processor: str = TOKENIZER) -> Any:
    """A model's tokenizer, with a padding token, or its processor, without the model.

    Raises:
        UserError: It has none.
    """
    try:
        with quiet():
            hub = {"revision": spec.revision} if spec.revision else {}
            found = _processor(locate(spec.name), processor, hub)
    except RecipeError:
        raise
    except _NO_MODEL as error:
        raise RecipeError(
            _cannot_load(spec.name, locate(spec.name), processor, processor, error)
        ) from error
    if processor != IMAGES:
        with_padding(text_tokenizer(found))
    return found


def _processor(where: str, kind: str, hub: dict[str, Any]) -> Any:
    # with Pillow, so that pixels do not depend on whether torchvision is installed; earlier
    # versions of transformers know `use_fast` and pass over `backend`
    options = {TOKENIZER: {}, IMAGES: {"backend": "pil", "use_fast": False}}
    given: dict[str, Any] = options.get(kind, {"backend": "pil"})
    return getattr(transformers, kind).from_pretrained(where, **hub, **given)


def locate(name: str) -> str:
    """What to hand to `from_pretrained`: a hub id as it is, or the path of a local folder.

    `package:NAME/SUB` is the folder SUB of the installed Python package NAME, which is not
    imported.

    Raises:
        UserError: If `name` is a path and no model lies there.

    Example:
        >>> locate("FacebookAI/roberta-base")
        'FacebookAI/roberta-base'
    """
    if name.startswith("package:"):
        path = _in_package(name.removeprefix("package:"))
    else:
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if not path.exists() and not looks_local:
            return name
    if not (path / "config.json").is_file():
        raise RecipeError(
            f"model.name: {name!r} is no model: there is no {path / 'config.json'}; expected a "
            "folder with config.json, the weights and the tokenizer's files, or a hub id"
        )
    return str(path)


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder with a model's config and weights, if they are on this machine.

    Args:
        name: Folder, `package:NAME/FOLDER`, or a hub id, for which the local cache is searched.
    """
    where, hub = locate(name), {"revision": revision} if revision else {}
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        with quiet():
            found = cached_file(
                where,
                file,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                **hub,
            )
        if found is not None:
            return Path(found).parent
    return None


def _in_package(name: str) -> Path:
    package, _, sub = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None and package in EXTRAS:
        raise missing(package, f"model.name: {name!r}")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"model.name: there is no Python package {package!r} in this environment; "
            "install it, or give a hub id or a local folder"
        )
    return Path(next(iter(spec.submodule_search_locations))) / sub


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        UserError: If torch does not know it or cannot use it here.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            f"model.device: {name!r} cannot be used: {_first_line(error)}; "
            "expected auto, cpu, cuda or cuda:N"
        ) from error
    return device


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block with torch's generators at `seed` and restores them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def unheard() -> Iterator[None]:
    """Runs a block without transformers' messages and progress bars; what the hub's library warns
    of goes to the process's own log alone, and not to stderr as well."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    handlers, hub.handlers = hub.handlers, []
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.handlers = handlers
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Runs a block without transformers' loading reports, progress bars and PEFT's warnings."""
    with unheard(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is a bitsandbytes one, which is neither read nor written as such."""
    weight = getattr(module, "weight", None)
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def dequantised(module: Any) -> Tensor:
    """The float32 matrix, out × in, that a quantised layer multiplies with; on the CPU."""
    weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
    return weight.detach().to("cpu", torch.float32)


def _quantisation(spec: ModelSpec, device: torch.device, keep: list[str]) -> dict[str, Any]:
    if spec.quantisation is None:
        return {}
    check_installed("bitsandbytes", f"model.quantisation: {spec.quantisation}")
    four_bit = spec.quantisation != "int8"
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=not four_bit,
        load_in_4bit=four_bit,
        bnb_4bit_quant_type=spec.quantisation if four_bit else "nf4",
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        llm_int8_skip_modules=["lm_head", *keep],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _check_found(model: nn.Module, missing: set[str], name: str) -> None:
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    if 2 * sum(sizes.get(key, 0) for key in missing) > sum(sizes.values()):
        raise RecipeError(
            f"model.name: most of the weights of a {type(model).__name__} are not in {name!r}, "
            f"{min(missing)} for one; expected pretrained weights that go with its config.json"
        )


def _cannot_load(name: str, where: str, auto_model: str, processor: str, error: Exception) -> str:
    files = _FILES.get(processor, "the processor's files")
    expected = _placeholder(Path(where)) or (
        "Expected a hub id (without a network: one in its cache, and HF_HUB_OFFLINE=1) or a folder "
        f"with config.json, the weights and {files}"
    )
    return f"model.name: {name!r} cannot be loaded as {auto_model}: {_first_line(error)} {expected}"


def _placeholder(folder: Path) -> str:
    """Which of a folder's files stands for another one; "" if none does."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    told = {file: stands_for(file) for file in files if file.is_symlink() or file.is_file()}
    return next((f"{file} is {what}" for file, what in told.items() if what), "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_padding(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, its end-of-text token made its padding token if it has none.

    Padding is masked everywhere, so that it does not matter which token it is.

    Raises:
        UserError: It has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                f"model.name: the tokenizer of {tokenizer.name_or_path!r} has neither a padding "
                "nor an end-of-text token; add a pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
