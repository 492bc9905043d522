"""Compiled models on ranks."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.segment_wave import apply_segments
from transnormer.parallel.sequence import apply_sequence_parallel
from transnormer.parallel.state_exchange import Chain


def compiled_on_ranks(
    group: dist.ProcessGroup,
    model: Decoder,
    batch: dict[str, Any],
    segment_tokens: int | None,
    axes: Axes | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of compiled blocks, the second time over, and the products in their graphs.

    Args:
        axes: share the parameters too; None is sequences alone, on the ranks of the group.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = copy.deepcopy(model)
    compile_blocks(model, backend=counter, whole=segment_tokens is not None)
    if axes is not None:
        model = Layout(axes, torch.device("cpu")).wrap(model)
    elif segment_tokens is None:
        model = apply_sequence_parallel(model, group)
    else:
        chain = Chain(group, dist.get_rank(group), dist.get_world_size(group))
        model = apply_segments(model, chain)
    for _ in range(2):
        model.zero_grad()
        if segment_tokens is None:
            loss = model.loss(**batch, reduction="sum")
            (loss / 7).backward()
        else:
            assert hasattr(model, "backward_in_segments")
            loss = model.backward_in_segments(**batch, segment_tokens=segment_tokens, divisor=7)
    found = {"loss": loss.detach()}
    for name, x in model.named_parameters():
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        if isinstance(grad, DTensor):
            found[name] = grad.full_tensor()
        else:
            dist.all_reduce(grad, group=group)
            found[name] = grad
    graphs = [graph.graph.nodes for graph in counter.graphs]
    return found, sum(node.target is torch._C._nn.linear for nodes in graphs for node in nodes)
