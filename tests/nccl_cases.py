"""What two GPUs compute in the tests of parallel/ over NCCL; importable, since they run it."""

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import model_in_parts
from segment_cases import in_segments
from torch import Tensor
from train_cases import constant_evaluation

from transnormer.models.decoder import Decoder
from transnormer.train import RunConfig, run_training


def _there(batch: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if x is None else x.cuda() for name, x in batch.items()}


def _back(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


def parts_on_gpus(
    group: dist.ProcessGroup,
    model: Decoder,
    batch: dict[str, Tensor | None],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """``model_in_parts`` on this rank's GPU."""
    return _back(model_in_parts(group, model.cuda(), _there(batch), None, options))


def segments_on_gpus(
    group: dist.ProcessGroup, model: Decoder, batch: dict[str, Tensor | None], tokens: int
) -> dict[str, Tensor]:
    """``in_segments`` on this rank's GPU."""
    return _back(in_segments(group, model.cuda(), _there(batch), tokens))


def run_on_gpus(group: dist.ProcessGroup, config: RunConfig, resume: bool) -> int:
    """A whole run that joins these processes as a launcher's; the steps done."""
    return run_training(config, resume=resume, evaluate=constant_evaluation).step


def sums(group: dist.ProcessGroup) -> tuple[str, float]:
    """The backend, and the sum of the ranks' numbers."""
    x = torch.full((1,), float(dist.get_rank(group) + 1), device="cuda")
    dist.all_reduce(x, group=group)
    return dist.get_backend(group), float(x)
