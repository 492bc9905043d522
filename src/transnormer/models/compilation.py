"""Regional compilation: each kind of block compiled once, whatever the depth."""

from torch import nn

from transnormer.models.decoder import Block

# Graphs of one piece of code that may live at once. All blocks share the code of ``Block.forward``:
# each kind has a graph, with and without gradients, and for a shorter last segment; torch's 8 would
# stop a run of a hybrid.
_GRAPHS = 64


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Let ``torch.compile`` compile the blocks of a model, each when it first runs.

    Blocks of one kind have one graph: weights are its inputs, so compile time grows with the kinds
    of blocks and not with their number. Attention is an op inside the graph; what surrounds it is
    fused. Embedding, last norm and the loss stay outside: the loss is an op of its own, and nothing
    around it is left to fuse. An input of another shape makes another graph.

    Args:
        model: changed in place; it computes the same, and its parameters keep their names.
        backend: of ``torch.compile``.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for module in model.modules():
        if isinstance(module, Block):
            # A graph break would run part of a block uncompiled, in silence.
            module.compile(fullgraph=True, backend=backend)
