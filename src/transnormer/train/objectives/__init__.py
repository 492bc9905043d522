"""What runs learn from: one file an objective, and a table from `objective.kind` to it."""

from transnormer.train.objectives.base import Counts, HeldoutReport, Objective, Setting
from transnormer.train.objectives.causal import CausalObjective, EvaluationReport
from transnormer.train.objectives.classification import (
    ClassificationObjective,
    ClassificationReport,
)
from transnormer.train.objectives.instruction import InstructionObjective, InstructionReport
from transnormer.train.objectives.masked import MaskedObjective, MaskedReport

__all__ = [
    "OBJECTIVES",
    "ClassificationReport",
    "Counts",
    "EvaluationReport",
    "HeldoutReport",
    "InstructionReport",
    "MaskedReport",
    "Objective",
    "Setting",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "causal": CausalObjective,
    "masked": MaskedObjective,
    "classification": ClassificationObjective,
    "instruction": InstructionObjective,
}
