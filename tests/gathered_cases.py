"""Compiled blocks that are gathered in bfloat16, with parts that are gathered on their own."""

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import train_batch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes


def gathered_in_bfloat16(
    group: dist.ProcessGroup, config: DecoderConfig, axes: Axes, whole: bool | None
) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of a batch, and the products in graphs; ``whole`` None compiles nothing."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model, counter = Decoder(config), CompileCounterWithBackend("aot_eager")
    if whole is not None:
        compile_blocks(model, backend=counter, whole=whole)
    layout = Layout(axes, torch.device("cpu"), gather_dtype=torch.bfloat16)
    model = layout.wrap(model)
    ids, labels = train_batch(0, config.vocab_size)
    own = slice(layout.rank, None, layout.world_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids[own], labels[own], reduction="sum")
    loss.backward()
    grads: dict[str, Any] = {name: x.grad for name, x in model.named_parameters()}
    products = sum(
        node.target is torch._C._nn.linear for graph in counter.graphs for node in graph.graph.nodes
    )
    found = {"loss": loss.detach()}
    return found | {n: g.full_tensor() for n, g in grads.items() if g is not None}, products
