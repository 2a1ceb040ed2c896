"""Updates that wait for the round's others: on disk, so that memory does not grow with them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedex_lora.disk import reason
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import pieces
from fedex_lora.federation.messages import Update


class Spool:
    """The updates of one round, by client, each put once; nothing is left when the block ends.

    Args:
        folder: For a file an update; None keeps them in memory.

    Raises:
        UserError: A full disk, or a folder that cannot be written.

    Example:
        >>> with Spool(None) as spool:
        ...     spool.put(Update(1, "a", {}, examples=3))
        ...     spool.get("a").examples
        3
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._updates: dict[str, Update] = {}

    def put(self, update: Update) -> None:
        """Takes in one update."""
        if self._folder is not None:
            path = self._path(update.client)
            try:
                with path.open("wb") as file:
                    file.writelines(pieces(update.tensors, {}))
            except OSError as error:
                raise UserError(
                    f"{path}: an update cannot be put aside: {reason(error)}. Free some space, "
                    "then `fedex-lora resume`; the last checkpoint is intact"
                ) from None
            update = replace(update, tensors={})
        self._updates[update.client] = update

    def get(self, client: str) -> Update:
        """The client's update, whole."""
        update = self._updates[client]
        if self._folder is None:
            return update
        try:
            return replace(update, tensors=load_file(self._path(client)))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._path(client)}: an update that was put aside cannot be read: "
                f"{reason(error)}; `fedex-lora resume`: the last checkpoint is intact"
            ) from None

    def _path(self, client: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{client}.safetensors"

    def __enter__(self) -> Self:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a process that was killed
            try:
                self._folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{self._folder}: cannot be made: {reason(error)}") from None
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
