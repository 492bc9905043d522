"""What the ranks of the tests of training in segments compute."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.models.decoder import Decoder
from transnormer.models.recompute import Checkpointing, set_checkpointing
from transnormer.models.segments import Context
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.segment_wave import apply_segments
from transnormer.parallel.state_exchange import Chain

DIVISOR = 7.0


def _gradients(model: Decoder) -> dict[str, Tensor]:
    found = {}
    for name, x in model.named_parameters():
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def whole(model: Decoder, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of the whole sequence on one process."""
    model = copy.deepcopy(model)
    loss = model.loss(**batch, reduction="sum")
    (loss / DIVISOR).backward()
    return {"loss": loss.detach()} | _gradients(model)


def half() -> torch.autocast:
    """What a run in bfloat16 enters around every forward pass."""
    return torch.autocast("cpu", torch.bfloat16)


def in_segments(
    group: dist.ProcessGroup,
    model: Decoder,
    batch: dict[str, Any],
    tokens: int,
    checkpointing: Checkpointing = "none",
    context: Context = nullcontext,
) -> dict[str, Tensor]:
    """The same of the segments of all ranks, with parameters that each of them holds."""
    model = copy.deepcopy(model)
    set_checkpointing(model, checkpointing)
    chain = Chain(group, dist.get_rank(group), dist.get_world_size(group))
    hosts = None
    if next(model.parameters()).is_cuda:
        hosts = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
    model = apply_segments(model, chain, hosts)
    loss = model.backward_in_segments(
        **batch, segment_tokens=tokens, divisor=DIVISOR, context=context
    )
    found = _gradients(model)
    for grad in found.values():
        dist.all_reduce(grad, group=group)
    return {"loss": loss} | found


def laid_out(
    group: dist.ProcessGroup, model: Decoder, batch: dict[str, Any], axes: Axes, tokens: int
) -> dict[str, Tensor]:
    """The same with shared parameters; each copy reads rows of its own, in two micro-batches."""
    layout = Layout(axes, torch.device("cpu"))
    model = layout.wrap(copy.deepcopy(model))
    assert hasattr(model, "backward_in_segments")
    total = torch.zeros(1, dtype=torch.float64)
    for part in zip(*(x[layout.rank :: layout.world_size].chunk(2) for x in batch.values())):
        total += model.backward_in_segments(*part, segment_tokens=tokens, divisor=DIVISOR)
    found = _gradients(model)
    # A pass over whole sequences goes on as if nothing had been.
    again = model.loss(**batch, reduction="sum")
    again.backward()
    return {"loss": layout.total(total)[0], "again": again.detach()} | found


def warned(group: dist.ProcessGroup, model: Decoder, batch: dict[str, Any]) -> list[str]:
    """What warnings say while shared parameters are trained in segments."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        laid_out(group, model, batch, Axes(sp=4), 8)
    return [str(warning.message) for warning in seen]
