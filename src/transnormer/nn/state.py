"""What a token mixer carries from one token to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from transnormer.ops import RingState, linear_attention_ring_step, linear_attention_step
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


class SlotState(NamedTuple):
    """Rows of a pool of recurrent states, which decoding advances where they lie.

    A mixer with ``steps_in_slots`` takes one instead of a state, for 1 to 8 tokens a row without
    pads, and returns it; nothing is copied. Without gradients.

    Attributes:
        pool: [slots, kv_heads, key_dim, value_dim], or a ``RingState`` of as many slots.
        slots: int32 [rows], the row of the pool that each row of the batch is; -1 skips a row,
            whose outputs then mean nothing.
    """

    pool: Tensor | RingState
    slots: Tensor

    def step(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """Advance the rows by the tokens of q, k and v, [rows, tokens, heads, dim]; returns o."""
        if isinstance(self.pool, RingState):
            return linear_attention_ring_step(q, k, v, log_decay, self.pool, slots=self.slots)
        return linear_attention_step(q, k, v, log_decay, self.pool, slots=self.slots)[0]


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
