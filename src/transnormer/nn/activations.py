"""Elementwise activations by name."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "silu", "relu", "elu", "1+elu", "sigmoid", "gelu"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "elu": F.elu,
    "1+elu": lambda x: 1.0 + F.elu(x),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a name; configurations have checked the name already."""
    return _FUNCTIONS[name]
