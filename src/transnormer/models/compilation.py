"""Regional compilation: each kind of block compiled once, whatever the depth."""

from collections.abc import Callable
from typing import Any

from torch import nn

from transnormer.models.decoder import Block

# Graphs of one piece of code that may live at once. All blocks share the code of ``Block.forward``:
# each kind has a graph, with and without gradients, and for a shorter last segment; torch's 8 would
# stop a run of a hybrid.
_GRAPHS = 64


def compile_blocks(
    model: nn.Module,
    *,
    backend: str | Callable[..., Any] = "inductor",
    activation_memory: float = 1.0,
    whole: bool = True,
) -> None:
    """Let ``torch.compile`` compile the blocks of a model, each when it first runs.

    Blocks of one kind have one graph: weights are its inputs, so compile time grows with the kinds
    of blocks and not with their number. Attention is an op inside the graph; what surrounds it is
    fused. Embedding, last norm and the loss stay outside: the loss is an op of its own, and nothing
    around it is left to fuse. An input of another shape makes another graph.

    Args:
        model: changed in place; it computes the same, and its parameters keep their names.
        backend: of ``torch.compile``.
        activation_memory: in (0, 1], the share that a block keeps for the backward pass of what is
            fastest. Just below 1 it keeps what products and attention give, and computes what lies
            between them, element by element, again; further down attention and products too, those
            that cost least for their size first. 1 is the fastest.
        whole: a block is one graph, or an error. False lets what is kept out of graphs on purpose,
            such as messages between processes, part it into several.

    Raises:
        ValueError: activation_memory outside of (0, 1].
    """
    import torch._dynamo

    if not 0 < activation_memory <= 1:
        raise ValueError(f"activation_memory is {activation_memory}; expected a share in (0, 1]")
    if activation_memory < 1:
        backend = _keeping(activation_memory, backend)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for module in model.modules():
        if isinstance(module, Block):
            # A graph break would run part of a block uncompiled, in silence.
            module.compile(fullgraph=whole, backend=backend)


def _keeping(share: float, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend whose graphs are cut for a share of the activations.

    torch has one such share for the whole process, read while a graph is cut; set around each of
    these graphs, it does not reach others. The cut is by a knapsack of operations over bytes.
    """
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    inner = lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=share):
            return inner(graph, inputs)

    return compile_graph
