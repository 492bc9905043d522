"""What the ranks of the tests of tensor parallelism compute."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_cases import train_batch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Block, Decoder, DecoderConfig
from transnormer.models.recompute import Checkpointing, set_checkpointing
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.state_dict import total_norm


class _Products(TorchFunctionMode):
    """Notes the strides of the gradients of what projections give, by the width of that."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: dict[int, set[tuple[int, ...]]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        y = function(*args, **(kwargs or {}))
        if function is F.linear and y.requires_grad:
            seen = self.strides.setdefault(y.shape[-1], set())
            y.register_hook(lambda grad: seen.add(grad.stride()))
        return y


def loss_and_norm(
    group: dist.ProcessGroup | None,
    config: DecoderConfig,
    checkpointing: Checkpointing = "none",
    backend: str = "",
    cut_residual: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Loss of a batch and the norm of its gradient, and how they were computed.

    Beside them the tokens between blocks, the graphs that were compiled, modules that hold results, the
    strides of the gradients of products into model_dim, and all gradients' dtypes.

    Args:
        group: the ranks that share the layers; None is one process alone.
        checkpointing: of the blocks.
        backend: compile the blocks; empty leaves them as they are.
        cut_residual: of the layout.
        dtype: of the parameters.
    """
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(3)
    model = Decoder(config).to(dtype)
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
    products = _Products()
    with nullcontext() if backend else products:
        loss = model.loss(*train_batch(0, config.vocab_size), reduction="sum")
    loss.backward()
    norm = total_norm(model.parameters())
    kept = [
        name
        for name, module in model.named_modules()
        for x in vars(module).values()
        if isinstance(x, Tensor) and x.grad_fn is not None
    ]
    return {
        "loss": loss.detach(),
        "norm": norm.detach(),
        "tokens": seen,
        "kept": kept,
        "strides": products.strides,
        "graphs": counters["stats"]["unique_graphs"],
        "dtypes": {str(x.grad.dtype) for x in model.parameters() if x.grad is not None},
        "shared_further": [type(m).__name__ for m in model.modules() if isinstance(m, FSDPModule)],
    }
