"""Training: the configuration of a run, the loop, checkpoints, metrics."""

from transnormer.train.divergence import TrainingDiverged
from transnormer.train.evaluation import Evaluate, Evaluation
from transnormer.train.metrics import HeldoutReport, Progress, Quiet, StepReport
from transnormer.train.objectives import ClassificationReport, EvaluationReport, MaskedReport
from transnormer.train.recipe import RunConfig, read_run
from transnormer.train.sync import GradSync, OneProcess
from transnormer.train.trainer import TrainResult, run_training

__all__ = [
    "ClassificationReport",
    "Evaluate",
    "Evaluation",
    "EvaluationReport",
    "GradSync",
    "HeldoutReport",
    "MaskedReport",
    "OneProcess",
    "Progress",
    "Quiet",
    "RunConfig",
    "StepReport",
    "TrainResult",
    "TrainingDiverged",
    "read_run",
    "run_training",
]
