"""Elementwise activations by name."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "silu", "relu", "elu", "1+elu", "sigmoid", "gelu"]


def _identity(x: Tensor) -> Tensor:
    return x


def _one_plus_elu(x: Tensor) -> Tensor:
    return 1.0 + F.elu(x)


# Named functions, since modules that hold them are pickled.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "silu": F.silu,
    "relu": F.relu,
    "elu": F.elu,
    "1+elu": _one_plus_elu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a name; configurations have checked the name already."""
    return _FUNCTIONS[name]
