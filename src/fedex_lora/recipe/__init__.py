"""Everything that determines a run, as values that are checked when they are made.

`fedex_lora.recipe.reader` reads and writes them as YAML.
"""

from fedex_lora.recipe.federation import (
    CLIENT_NAME,
    CLIENT_NAME_RULE,
    FederationSpec,
    PartitionSpec,
)
from fedex_lora.recipe.limits import limits
from fedex_lora.recipe.model import LoraSpec, MethodSpec, ModelSpec
from fedex_lora.recipe.part import Part, Problem, did_you_mean
from fedex_lora.recipe.task import COMMONSENSE, GLUE, GLUE_TEXTS, DataSpec, TaskSpec
from fedex_lora.recipe.whole import EngineSpec, EvaluationSpec, Recipe, RecordsSpec

__all__ = [
    "CLIENT_NAME",
    "CLIENT_NAME_RULE",
    "COMMONSENSE",
    "GLUE",
    "GLUE_TEXTS",
    "DataSpec",
    "EngineSpec",
    "EvaluationSpec",
    "FederationSpec",
    "LoraSpec",
    "MethodSpec",
    "ModelSpec",
    "Part",
    "PartitionSpec",
    "Problem",
    "Recipe",
    "RecordsSpec",
    "TaskSpec",
    "did_you_mean",
    "limits",
]
