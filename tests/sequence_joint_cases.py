"""A released layer whose rows are cut among ranks, with its kernels; importable, since ranks run it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transnormer.nn.token_mixers.lightning import Lightning, LightningConfig
from transnormer.parallel.sequence_cores import SequenceLinearCore
from transnormer.parallel.sequence_part import SequenceAxis, cut
from transnormer.parallel.state_exchange import Chain, Exchange

DIM, HEADS = 32, 2
# Of one, 6 tokens are more than float32 remembers; the other's past matters everywhere.
LOG_DECAY = (-3.0, -0.05)


def layer(implementation: str = "triton") -> Lightning:
    """The layer, the same on all ranks."""
    torch.manual_seed(2)
    config = LightningConfig(heads=HEADS, implementation=implementation)
    mixer = config.build(DIM, 1, 3, causal=True)
    mixer.decay.log_decay = torch.tensor(LOG_DECAY, dtype=torch.float64)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return mixer


def inputs(seq: int) -> tuple[Tensor, Tensor]:
    """Two rows, and the gradient of what the layer makes of them."""
    generator = torch.Generator().manual_seed(4)
    x, grad = torch.randn(2, 2, seq, DIM, generator=generator)
    return x, grad


def run(mixer: Lightning, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Outputs, the gradient of x and those of the weights."""
    leaf = x.clone().requires_grad_()
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    y, _ = mixer(leaf, positions=positions, keep_state=False)
    y.backward(grad)
    assert leaf.grad is not None
    weights = {name: x.grad for name, x in mixer.named_parameters() if x.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **weights}


def whole(seq: int) -> dict[str, Tensor]:
    """The layer in one process, in float64."""
    mixer = layer("auto").double()
    return run(mixer, *(x.double() for x in inputs(seq)))


def in_parts(
    group: dist.ProcessGroup, lengths: tuple[int, ...], exchange: Exchange
) -> tuple[dict[str, Tensor], int]:
    """The part of a rank, gradients of weights summed over the ranks, and the joint calls."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    axis = SequenceAxis(Chain(group, rank, size, exchange))
    axis.part, _ = cut(sum(lengths), rank, lengths)
    mixer = layer()
    mixer.core = core = SequenceLinearCore(mixer.core, axis)
    calls: list[Any] = []
    original = core.joint_in_parts
    core.joint_in_parts = lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs)
    own = slice(axis.part.start, axis.part.end)
    found = run(mixer, *(x[:, own] for x in inputs(sum(lengths))))
    for name, _ in mixer.named_parameters():
        dist.all_reduce(found[name], group=group)
    return found, len(calls)
