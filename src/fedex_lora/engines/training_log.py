"""The Trainer's own reports (`training.report_to`): a place and a name for each client's turn.

A client trains in a directory that is deleted afterwards, so TensorBoard's files are sent to the
run's; Weights & Biases, MLflow and the others get a name and keep their own settings, which are
environment variables.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback

from fedex_lora.errors import RecipeError


@dataclass(frozen=True)
class TrainingLog:
    """Where reports of a run go.

    Attributes:
        directory: Of the run's logs; TensorBoard's event files lie in CLIENT/round-N of it.
        name: Of the run.
    """

    directory: Path
    name: str

    def turn(self, client: str, round: int) -> TrainingLog:
        """That of one client in one round.

        Example:
            >>> log = TrainingLog(Path("run/logs"), "sst2-fedex-seed0").turn("ann", 2)
            >>> log.directory.as_posix(), log.name
            ('run/logs/ann/round-2', 'sst2-fedex-seed0/ann/round-2')
        """
        part = f"{client}/round-{round}"
        return TrainingLog(self.directory / part, f"{self.name}/{part}")


def named(training: Mapping[str, Any], log: TrainingLog | None) -> Mapping[str, Any]:
    """The recipe's `training` block, with the turn's name for the reports."""
    return training if log is None else {**training, "run_name": log.name}


@contextmanager
def reported(trainer: Trainer, log: TrainingLog | None) -> Iterator[None]:
    """While the trainer trains, TensorBoard's files go where `log` says.

    Weights & Biases writes to one run a process until that is finished, so a run that begins here
    is finished here.

    Raises:
        UserError: A report could not be made: nobody is logged in, a server does not answer.
    """
    for callback in trainer.callback_handler.callbacks if log else []:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(log.directory)  # type: ignore[union-attr]
    wandb = sys.modules.get("wandb")
    ours = wandb is not None and wandb.run is None
    try:
        yield
    except Exception as error:
        if not _of_a_report(error):
            raise
        raise RecipeError(
            f"training.report_to: {type(error).__name__}: {error}; settings of reports are their "
            "own environment variables; `none` trains without"
        ) from error
    finally:
        if ours and wandb.run is not None:  # type: ignore[union-attr]
            wandb.finish()  # type: ignore[union-attr]


def _of_a_report(error: Exception) -> bool:
    """Whether it was raised on the way through the Trainer's reports."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f.f_globals.get("__name__") == integration_utils.__name__ for f in frames)
