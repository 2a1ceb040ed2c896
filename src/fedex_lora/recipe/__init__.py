"""Everything that determines a run, as values that are checked when they are made.

`fedex_lora.recipe.reader` reads and writes them as YAML.
"""

from fedex_lora.recipe.blocks import EngineSpec, EvaluationSpec, RecordsSpec
from fedex_lora.recipe.data import DataSpec
from fedex_lora.recipe.federation import (
    CLIENT_NAME,
    CLIENT_NAME_RULE,
    FederationSpec,
    PartitionSpec,
)
from fedex_lora.recipe.limits import limits
from fedex_lora.recipe.model import LoraSpec, MethodSpec, ModelSpec
from fedex_lora.recipe.part import Part, Problem, did_you_mean
from fedex_lora.recipe.privacy import Privacy, SecureAggregation
from fedex_lora.recipe.task import TaskSpec, register_task, spec_of, task_kinds, task_spec
from fedex_lora.recipe.whole import Recipe

__all__ = [
    "CLIENT_NAME",
    "CLIENT_NAME_RULE",
    "DataSpec",
    "EngineSpec",
    "EvaluationSpec",
    "FederationSpec",
    "LoraSpec",
    "MethodSpec",
    "ModelSpec",
    "Part",
    "PartitionSpec",
    "Privacy",
    "Problem",
    "Recipe",
    "RecordsSpec",
    "SecureAggregation",
    "TaskSpec",
    "did_you_mean",
    "limits",
    "register_task",
    "spec_of",
    "task_kinds",
    "task_spec",
]
