"""Where a training step's time goes, from a profile, and what each part needs at least."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.models.device_peaks import Peak

ATTENTION, MATMULS, ELEMENTS = "attention", "matmuls", "norm, gate, other"
LOSS, OPTIMIZER, IDLE = "loss", "optimizer", "idle"
PARTS = (ATTENTION, MATMULS, ELEMENTS, LOSS, OPTIMIZER, IDLE)

# Of the optimizer, though no operation is around it.
_STEP = "adamw_kernel"
# What an operation is by a piece of its own or of an enclosing one's name; the first that fits.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LOSS, ("transnormer::linear_cross_entropy",)),
    (OPTIMIZER, ("Optimizer.step", "Optimizer.zero_grad", "aten::_foreach_", "aten::_fused_adam")),
    (ATTENTION, ("attention", "transnormer::complex_scan", "transnormer::logcumsumexp")),
    (
        MATMULS,
        (
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "aten::linear",
            "aten::matmul",
            "aten::_scaled_mm",
        ),
    ),
)


def part_of(names: Iterable[str]) -> str:
    """The part of an operation, given its own name and those of what encloses it."""
    all_names = list(names)
    for part, pieces in _NAMES:
        if any(piece in name for name in all_names for piece in pieces):
            return part
    return ELEMENTS


def time_by_part(events: Iterable[Any], wall_ms: float, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part, from a profiler's events over `wall_ms`.

    On a GPU the kernels that operations launched; on a CPU the operations themselves, each without
    what it calls. What is left of the time is idle: on a GPU without a kernel, on a CPU outside of
    operations, in Python.
    """
    times, kernels = dict.fromkeys(PARTS, 0.0), 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # An annotation on the GPU's timeline spans kernels that are counted themselves.
            if not event.is_user_annotation:
                kernels += event.self_device_time_total / 1000
                if device.type == "cuda" and _STEP in event.name:
                    times[OPTIMIZER] += event.self_device_time_total / 1000
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own:
            times[part_of(_lineage(event))] += own / 1000
    if device.type == "cuda":
        # Kernels that no operation around them claims: those of compiled graphs, if any.
        times[ELEMENTS] += max(0.0, kernels - sum(times.values()))
    times[IDLE] = max(0.0, wall_ms - sum(times.values()))
    return times


def _lineage(event: Any) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


class Floor(NamedTuple):
    """What a part needs at least.

    Attributes:
        flops: operations of products.
        bytes: to and from the device's memory.
    """

    flops: float
    bytes: float

    def milliseconds(self, peak: Peak, precision: str) -> float:
        """The longer of the two on a device."""
        return 1000 * max(self.flops / peak.flops(precision), self.bytes / peak.bandwidth)


def floors(
    model: Decoder,
    tokens: int,
    context: int,
    precision: str,
    *,
    weights: str = "float32",
    gradients: str = "float32",
    states: str = "float32",
) -> Mapping[str, Floor]:
    """The floors of a training step of so many tokens; products three times for both passes.

    Bytes count every tensor once, as if all that lies between two products were one kernel:

    - attention: reads q, k, v and writes o; backward reads them and do, writes dq, dk, dv: 11
      tensors of model_dim;
    - norms, gates and residuals: 11 of model_dim and 3 of the channel mixer's width a block,
      forward; three times that with the backward pass;
    - the optimizer: reads parameter, gradient and two moments, writes all but the gradient; bfloat16
      weights beside float32 states have their rest with them, 4 bytes in all.

    What a step computes again (logits, checkpoints, segments) and clipping are above the floor.
    """
    config, cost = model.config, ModelCost.of(model.config, torch.float32)
    flops = cost.flops(context)
    size = 2 if precision == "bfloat16" else 4
    dim, blocks = config.model_dim, config.blocks
    width = sum(getattr(block.channel_mixer, "hidden_dim", None) or 0 for block in blocks)
    elements = 11 * dim * len(blocks) + 3 * width
    gradient, moment = (2 if x == "bfloat16" else 4 for x in (gradients, states))
    kept = 2 if weights == states == "bfloat16" else 4
    return {
        ATTENTION: Floor(3 * flops.mixing * tokens, 11.0 * dim * len(blocks) * size * tokens),
        MATMULS: Floor(3 * flops.projections * tokens, 0.0),
        ELEMENTS: Floor(0.0, 3.0 * elements * size * tokens),
        LOSS: Floor(3 * flops.head * tokens, 0.0),
        OPTIMIZER: Floor(0.0, (2.0 * kept + gradient + 4 * moment) * cost.parameters),
        IDLE: Floor(0.0, 0.0),
    }
