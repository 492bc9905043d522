"""What two GPUs compute in the tests of parallel/ over NCCL; importable, since they run it."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import model_in_parts
from segment_cases import in_segments
from torch import Tensor
from train_cases import constant_evaluation

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.parallel import sequence_cores
from transnormer.parallel.sequence import apply_sequence_parallel
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


def joint_parts_on_gpus(
    group: dist.ProcessGroup | None,
    model: Decoder,
    batch: dict[str, Tensor | None],
    lengths: tuple[int, ...] | None,
    compiled: bool,
) -> tuple[dict[str, Tensor], int]:
    """Loss and summed gradients of a model in bfloat16, and its calls of the joint op in parts.

    Args:
        group: of the ranks that share each row; None is whole rows on this GPU.
    """
    model = copy.deepcopy(model).cuda()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, whole=group is None)
    calls = []
    options = {}
    if group is not None:
        model = apply_sequence_parallel(model, group)
        options["lengths"] = lengths
        original = sequence_cores.joint_attention_in_parts
        sequence_cores.joint_attention_in_parts = lambda *given, **named: (
            calls.append(given) or original(*given, **named)
        )
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(**_there(batch), reduction="sum", **options)
        loss.backward()
    finally:
        if group is not None:
            sequence_cores.joint_attention_in_parts = original
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
    return _back(found), len(calls)


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
