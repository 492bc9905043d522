"""One micro-batch's gradient: of the whole batch at once, as a graph of it, or by segments."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transnormer.models.decoder import Decoder
from transnormer.models.segments import backward_in_segments, check_segments
from transnormer.train.graphs import GraphedBackward, check_graphed, cuda_capture
from transnormer.train.objectives import Objective
from transnormer.train.objectives.base import to_device
from transnormer.train.precision import autocast_for
from transnormer.train.wide_sums import WideSums

# (model, batch on the CPU, divisor) -> summed loss in nats, no graph. Adds the gradient of the
# summed loss / divisor to the parameters.
Backward = Callable[[Any, Any, float], Tensor]


def make_backward(
    objective: Objective,
    model: torch.nn.Module,
    device: torch.device,
    precision: str,
    segment_tokens: int | None,
    *,
    cuda_graph: bool = False,
    wide_sums: bool = False,
) -> Backward:
    """Choose how a run makes its gradients.

    Args:
        objective: of the run.
        model: of the run.
        device: where the model is.
        precision: "bfloat16" puts every forward pass under autocast.
        segment_tokens: of the run; None takes every batch whole.
        cuda_graph: capture whole batches and replay them.
        wide_sums: add gradients of bfloat16 parameters up in float32, see ``WideSums``.

    Raises:
        NotImplementedError: the model refuses segments.
        RuntimeError, ValueError: the device or the model cannot be captured.
    """

    def context() -> AbstractContextManager[object]:
        return autocast_for(precision, device) or nullcontext()

    def whole(model: Any, batch: Any, divisor: float | Tensor) -> Tensor:
        with context():
            loss = objective.loss(model, to_device(batch, device))
        (loss / divisor).backward()
        return loss.detach()

    def in_segments(model: Any, batch: Any, divisor: float) -> Tensor:
        assert segment_tokens is not None
        # On several ranks the model has a way of its own.
        run = getattr(model, "backward_in_segments", partial(backward_in_segments, model))
        # The bounds stay on the CPU, where the segments are planned.
        return run(
            batch.input_ids.to(device, non_blocking=True),
            batch.labels.to(device, non_blocking=True),
            segment_tokens=segment_tokens,
            cu_seqlens=batch.cu_seqlens,
            divisor=divisor,
            context=context,
        )

    chosen: Callable[..., Tensor] = whole
    if segment_tokens is not None:
        assert isinstance(model, Decoder)
        check_segments(model)
        chosen = in_segments
    if wide_sums:
        chosen = WideSums(model).around(chosen)
    if cuda_graph:
        check_graphed(model, device)
        return GraphedBackward(chosen, model, device, cuda_capture())
    return chosen
