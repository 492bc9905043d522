"""Launches of the kernels of Lightning Attention 1: what ``lightning1_ops``'s ops do."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops.linear_attention import triton_launch
from transnormer.ops.linear_attention.constant_decay import gpu_of
from transnormer.ops.linear_attention.launch_config import (
    Gpu,
    block_of,
    local_state_tiles,
    segments_of,
)
from transnormer.ops.linear_attention.triton_lightning1 import (
    leaving_state_kernel,
    quadratic_kernel,
)
from transnormer.ops.linear_attention.triton_runtime import (
    arithmetic,
    block,
    device_of,
    launch,
    sum_groups,
    walkable,
)
from transnormer.ops.linear_attention.triton_units import unit_table


class _Tiles(NamedTuple):
    """Tokens and dims of a program's tiles."""

    queries: int
    keys: int
    key_block: int
    value_block: int
    warps: int
    stages: int


def _tiles(key_dim: int, value_dim: int, dtype: torch.dtype, gpu: Gpu) -> _Tiles:
    """Tiles of a product with these dims.

    The sum, queries x value_block in float32, lies in a program's registers; the queries and
    ``stages`` tiles of keys and values lie in shared memory (227 KiB on Hopper).
    """
    block, values = block_of(key_dim), block_of(value_dim)
    if dtype == torch.float32:
        # Three products for one take three times the registers.
        if block <= 64:
            return _Tiles(64, 32, block, min(values, 64), 4, 2)
        if block == 128:
            return _Tiles(64, 16, block, min(values, 64), 4, 2)
        if block == 256:
            return _Tiles(32, 16, block, min(values, 64), 4, 2)
        return _Tiles(16, 16, block, min(values, 32), 4, 2)
    if gpu.shared_memory < 220_000:
        return _Tiles(64, 64 if block <= 128 else 32, block, min(values, 64), 4, 2)
    stages = 3 if block <= 128 else 2
    return _Tiles(128, 64 if block <= 256 else 32, block, min(values, 128), 8, stages)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        self.batch, self.seq, self.heads = q.shape[:3]
        self.groups = self.heads // k.shape[2]
        self.log_decay, self.cu_seqlens = log_decay, cu_seqlens
        self.reverse, self.dtype = reverse, q.dtype
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        forms = {"CONSTANT": log_decay is not None, "PACKED": cu_seqlens is not None}
        self.arithmetic: dict[str, Any] = arithmetic(q.dtype) | forms
        # The tiles of the product hold no state that many chunks could wear out.
        self.exact = self.arithmetic.pop("EXACT")

    def _table(self, tile: int) -> tuple[Tensor | None, int, int]:
        """The table of packed tiles of queries, their number, and tiles a sequence (not packed)."""
        if self.cu_seqlens is None:
            segments = -(-self.seq // tile)
            return None, self.batch * segments, segments
        table, _ = unit_table(self.cu_seqlens, self.seq, tile)
        return table, table.shape[0], 0

    def product(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        entry: Tensor | None,
        scale: float,
        *,
        against: bool = False,
        transposed: bool,
    ) -> Tensor:
        """The masked product of three tensors, [batch, seq, heads, v's dim].

        Args:
            q, k, v: in their roles, with heads or kv_heads.
            entry: state that enters, [sequences, kv_heads, key_dim, value_dim], or its gradient.
            scale: of the product, and of what comes from a state, but not from its gradient.
            against: the order is opposite to the forward pass's.
            transposed: key_dim is the dim of v here, not of q and k.
        """
        tiles = _tiles(q.shape[3], v.shape[3], self.dtype, gpu_of(q.device))
        table, units, segments = self._table(tiles.queries)
        o = v.new_empty(self.batch, self.seq, self.heads, v.shape[3])
        launch(
            quadratic_kernel, units * self.heads * -(-v.shape[3] // tiles.value_block),
            q, k, v, self.log_decay, entry, o, table, self.cu_seqlens, *q.stride()[:3],
            *k.stride()[:3], *v.stride()[:3], self.seq, segments, units, self.heads,
            self.heads // q.shape[2], self.heads // k.shape[2], self.groups,
            1.0 if against else scale, scale, D=q.shape[3], E=v.shape[3], M=tiles.queries,
            N=tiles.keys, BD=tiles.key_block, BE=tiles.value_block, ENTRY=entry is not None,
            SHIFT=int(against), TRANSPOSED=transposed, REVERSE=self.reverse != against,
            STAGES=tiles.stages, num_warps=tiles.warps, **self.arithmetic,
        )  # fmt: skip
        return o

    def leaving_state(
        self, k: Tensor, v: Tensor, initial: Tensor | None, scale: float, *, against: bool
    ) -> Tensor:
        """The states that leave the sequences, [sequences, heads of k and v, key_dim, value_dim]."""
        heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
        gpu = gpu_of(k.device)
        tiles = local_state_tiles(key_dim, value_dim, self.dtype, gpu)
        rows = self.sequences * heads * -(-value_dim // tiles.value_block)
        pieces = segments_of(rows, self.seq, gpu)
        states = torch.empty(
            pieces, self.sequences, heads, key_dim, value_dim, dtype=torch.float32, device=k.device
        )
        launch(
            leaving_state_kernel, rows * pieces,
            k, v, self.log_decay, initial, states, self.cu_seqlens, *k.stride()[:3],
            *v.stride()[:3], self.seq, self.sequences, pieces, heads,
            self.groups if against else 1, scale, K=key_dim, V=value_dim, C=tiles.chunk,
            BD=tiles.key_block, BE=tiles.value_block, SHIFT=int(against),
            INITIAL=initial is not None, REVERSE=self.reverse != against,
            EXACT=self.exact, STAGES=tiles.stages, num_warps=tiles.warps,
            **self.arithmetic,
        )  # fmt: skip
        return states.squeeze(0) if pieces == 1 else states.sum(0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final states."""
    q, k, v = (walkable(x) for x in (q, k, v))
    log_decay, initial_state, cu_seqlens = (
        block(x) for x in (log_decay, initial_state, cu_seqlens)
    )
    with device_of(q):
        call = _Call(q, k, log_decay, cu_seqlens, reverse)
        o = call.product(q, k, v, initial_state, scale, transposed=False)
        return o, call.leaving_state(k, v, initial_state, 1.0, against=False)


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    with_decay: bool,
    with_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and initial_state (the last two empty where not asked for)."""
    q, k, v, do = (walkable(x) for x in (q, k, v, do))
    log_decay, initial_state, cu_seqlens, d_final = (
        block(x) for x in (log_decay, initial_state, cu_seqlens, d_final)
    )
    d_decay, d_initial = q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    with device_of(q):
        call = _Call(q, k, log_decay, cu_seqlens, reverse)
        dq = call.product(do, v, k, initial_state, scale, transposed=True)
        dk = call.product(v, do, q, d_final, scale, against=True, transposed=True)
        dv = call.product(k, q, do, d_final, scale, against=True, transposed=False)
        if with_initial:
            d_initial = call.leaving_state(q, do, d_final, scale, against=True)
        if with_decay and log_decay is not None:
            # In the chunked form: the paper's has no such gradient.
            chunked = triton_launch.Call(q, k, v, log_decay, cu_seqlens, scale, reverse)
            entry = triton_launch.entry_of(chunked.states(initial_state), initial_state)
            grad_entry = triton_launch.entry_of(chunked.grad_states(do, d_final), d_final)
            d_decay = triton_launch.decay_gradient(chunked, log_decay, do, entry, grad_entry)
    kv_heads = k.shape[2]
    dk, dv = sum_groups(dk, 2, kv_heads), sum_groups(dv, 2, kv_heads)
    if with_initial:
        d_initial = sum_groups(d_initial, 1, kv_heads)
    return dq, dk, dv, d_decay, d_initial
