"""Whether a run has the room it needs, on the disk and in memory: a formula of its settings.

Only what is certain counts: no estimates, so that no run is refused that would have fitted. What
a run is likely to need, and to take, `fedex_lora.runs.plan` works out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.aggregator import assign
from fedex_lora.engines.setup import Federation, recipe_task
from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.settings import Settings
from fedex_lora.model.architectures import architecture_of, local_folder
from fedex_lora.model.load import pick_device
from fedex_lora.recipe import Recipe
from fedex_lora.runs.plan.memory import server_memory, total, turn_memory, weights
from fedex_lora.runs.plan.traffic import statistics

KEPT = 4  # checkpoints at a time: the best, the two newest, and one that is being written
