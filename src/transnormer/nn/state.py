"""What a token mixer carries from one token to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype

# A layer's state: one tensor, or a NamedTuple of tensors. The first dim of each tensor is the rows.
LayerState: TypeAlias = Tensor | tuple[Tensor, ...]


class KVState(NamedTuple):
    """Keys and values of past tokens, for mixers that look at tokens one by one.

    Attributes:
        keys: [rows, length, kv_heads, key_dim] in the activations' dtype, rotated already.
        values: [rows, length, kv_heads, value_dim].
        valid: bool [rows, length]; False slots (pads, rows that are shorter) are never looked at.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor


def tensors_of(state: LayerState) -> tuple[Tensor, ...]:
    """The tensors of a layer's state, in the order of its fields."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def map_tensors(function: Callable[[Tensor], Tensor], state: LayerState) -> Any:
    """The state with each tensor replaced by ``function`` of it."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) for x in state))


def named_tensors(name: str, state: LayerState) -> dict[str, Tensor]:
    """The tensors of a layer's state by name: ``name``, or ``name.field`` for each field."""
    if isinstance(state, Tensor):
        return {name: state}
    fields = getattr(state, "_fields", None)
    if fields is None:
        raise TypeError(f"{name} is a {type(state).__name__}; expected a tensor or a NamedTuple")
    return {f"{name}.{field}": x for field, x in zip(fields, state, strict=True)}


def from_named_tensors(name: str, tensors: dict[str, Tensor], like: LayerState) -> Any:
    """The state of the kind of ``like`` whose tensors have the names of ``named_tensors``.

    Raises:
        ValueError: a tensor is absent; it is named.
    """
    found = []
    for key in named_tensors(name, like):
        if key not in tensors:
            raise ValueError(f"{key} is absent; expected {', '.join(named_tensors(name, like))}")
        found.append(tensors[key])
    return found[0] if isinstance(like, Tensor) else type(like)(*found)


def state_bytes(state: LayerState) -> int:
    """Bytes of a layer's state; works on the meta device."""
    return sum(x.numel() * x.element_size() for x in tensors_of(state))


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros in the dtype that states of activations of ``dtype`` have."""
    return torch.zeros(*shape, dtype=accumulation_dtype(dtype), device=device)
