"""Optimizers and schedules on parameter lists."""

from transnormer.optim.optimizers import (
    Optimizer,
    OptimizerConfig,
    build_optimizer,
    clip_factor,
    gradient_norm,
    is_matrix,
)
from transnormer.optim.schedules import ScheduleConfig, lr_factor
from transnormer.optim.shared_muon import WholeMatrices

__all__ = [
    "Optimizer",
    "OptimizerConfig",
    "ScheduleConfig",
    "WholeMatrices",
    "build_optimizer",
    "clip_factor",
    "gradient_norm",
    "is_matrix",
    "lr_factor",
]
