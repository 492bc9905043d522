"""Training: the configuration of a run, the loop, checkpoints, metrics."""

from transnormer.train.divergence import TrainingDiverged
from transnormer.train.evaluation import Evaluate, Evaluation
from transnormer.train.metrics import EvaluationReport, Progress, Quiet, StepReport
from transnormer.train.recipe import RunConfig, read_run
from transnormer.train.sync import GradSync, OneProcess
from transnormer.train.trainer import TrainResult, run_training

__all__ = [
    "Evaluate",
    "Evaluation",
    "EvaluationReport",
    "GradSync",
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
