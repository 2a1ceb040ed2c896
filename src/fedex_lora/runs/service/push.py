"""An exported adapter or model to the hub: the files it consists of, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from fedex_lora.disk import reason
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.runs.export import is_export

CARD = "README.md"
_PARTS = (  # what exports consist of
    CARD,
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merge.json",
    "merges.txt",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "spiece.model",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.*",
    "*.gguf",
)


@dataclass(frozen=True)
class Parcel:
    """What would be sent.

    Attributes:
        repo: ORGANISATION/NAME.
        files: Bytes by name.
        left_out: What else is in the folder.
    """

    folder: Path
    repo: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]


def parcel(folder: Path, repo: str) -> Parcel:
    """The files of an export, for a repository of the hub.

    Raises:
        UserError: No adapter and no model is there, it has no card, or `repo` is no such name.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"`repo`: {repo!r}: {error}; expected ORGANISATION/NAME") from None
    if not is_export(folder):
        raise StorageError(f"{folder}: no adapter and no model there (no config.json)")
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in there}
    files = {n: size for n, size in names.items() if any(fnmatch(n, p) for p in _PARTS)}
    files = {n: size for n, size in files.items() if "/" not in n}
    if CARD not in files:
        raise StorageError(
            f"{folder}: has no card ({CARD}); write one, it is what people see first"
        )
    return Parcel(folder, repo, files, tuple(sorted(names.keys() - files.keys())))


def unable() -> str | None:
    """Why nothing can be sent from here; None if it can be tried."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return "there is no token; `hf auth login`, or set HF_TOKEN"
    return None


def send(goods: Parcel, private: bool, message: str) -> str:
    """Sends the files in one commit; makes the repository where there is none.

    Returns:
        The address of the repository.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(goods.repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(goods.folder),
            repo_id=goods.repo,
            allow_patterns=list(goods.files),
            commit_message=message,
        )
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise StorageError(
            f"{goods.repo}: the hub did not take it: {reason(error)}. Nothing else was changed; "
            "the same command tries again"
        ) from None
    return str(url)
