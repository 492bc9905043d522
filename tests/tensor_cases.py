"""What the ranks of the tests of tensor parallelism compute."""

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import train_batch
from torch import Tensor

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Block, Decoder, DecoderConfig
from transnormer.models.recompute import Checkpointing, set_checkpointing
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.state_dict import total_norm


def loss_and_norm(
    group: dist.ProcessGroup | None,
    config: DecoderConfig,
    checkpointing: Checkpointing = "none",
    backend: str = "",
    cut_residual: bool = False,
) -> dict[str, Any]:
    """Loss of a batch, the norm of its gradient, the tokens between blocks, and what graphs were kept.

    Args:
        group: the ranks that share the layers; None is one process alone.
        checkpointing: of the blocks.
        backend: compile the blocks; empty leaves them as they are.
        cut_residual: of the layout.
    """
    torch.manual_seed(3)
    model = Decoder(config).double()
    set_checkpointing(model, checkpointing)
    if backend:
        compile_blocks(model, backend=backend)
    if group is not None:
        axes = Axes(tp=dist.get_world_size(group))
        model = Layout(axes, torch.device("cpu"), cut_residual=cut_residual).wrap(model)
    seen: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, Block))
    if not backend:
        first.register_forward_hook(lambda block, args, output: seen.append(output[0].shape[1]))
    loss = model.loss(*train_batch(0, config.vocab_size), reduction="sum")
    loss.backward()
    norm = total_norm(model.parameters())
    kept = [
        name
        for name, module in model.named_modules()
        for x in vars(module).values()
        if isinstance(x, Tensor) and x.grad_fn is not None
    ]
    return {"loss": loss.detach(), "norm": norm.detach(), "tokens": seen, "kept": kept}
