"""The values that the parts of a new model begin with, in the order in which they are drawn."""

import torch
from torch import nn


@torch.no_grad()
def reset_projections(part: nn.Module, std: float) -> None:
    """Projections and embeddings N(0, std^2), in the order of modules; biases 0."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def reset_others(part: nn.Module) -> None:
    """What modules with a ``reset_parameters`` of their own say, in the order of modules.

    After the projections of all parts: a mixer with an initialisation of its own overrides the common
    one.
    """
    for module in part.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and not isinstance(module, nn.Linear | nn.Embedding):
            reset()
