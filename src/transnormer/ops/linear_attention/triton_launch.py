"""Launches of the constant-decay kernels: what the ops of ``constant_decay`` do.

Legend: U units (segments of all sequences).
"""

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.constant_decay import gpu_of, plan
from transnormer.ops.linear_attention.launch_config import Tiles
from transnormer.ops.linear_attention.triton_constant import (
    backward_kernel,
    carry_kernel,
    forward_kernel,
    local_state_kernel,
)
from transnormer.ops.linear_attention.triton_decay_gradient import decay_gradient_kernel
from transnormer.ops.linear_attention.triton_runtime import (
    CARRY_BLOCK,
    arithmetic,
    block,
    device_of,
    launch,
    sum_groups,
    walkable,
)
from transnormer.ops.linear_attention.triton_units import unit_table


class Call:
    """What the launches of one call share. q, k, v: last dim contiguous; the rest: contiguous."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        reverse: bool,
    ) -> None:
        self.q, self.k, self.v, self.log_decay, self.cu_seqlens = q, k, v, log_decay, cu_seqlens
        self.scale, self.reverse, self.dtype = scale, reverse, q.dtype
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.groups = self.heads // self.kv_heads
        self.seq, self.key_dim, self.value_dim = k.shape[1], k.shape[3], v.shape[3]
        self.plan, self.gpu = plan(k, self.heads, cu_seqlens), gpu_of(k.device)
        self.sequences, self.packed = k.shape[0], cu_seqlens is not None
        self.table = self.first_unit = None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.table, self.first_unit = unit_table(cu_seqlens, self.seq, self.plan.length)
        self.arithmetic = arithmetic(q.dtype)

    @property
    def cut(self) -> tuple[int, int, int]:
        """T, L and SEGMENTS of the kernels."""
        return self.seq, self.plan.length, self.plan.segments

    def sweep_tiles(self, key_dim: int, value_dim: int, *, backward: bool = False) -> Tiles:
        """Tiles of a sweep with these dims."""
        rows = self.plan.units * self.heads
        return launch_config.sweep_tiles(
            key_dim, value_dim, self.dtype, rows, self.gpu, backward=backward
        )

    def empty_states(self, heads: int) -> Tensor:
        """One state a sequence and head, float32, not filled."""
        shape = (self.sequences, heads, self.key_dim, self.value_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def states(self, initial: Tensor | None) -> Tensor | None:
        """States that enter the units, [U, kv_heads, key_dim, value_dim]; None if nothing carries."""
        if not self.plan.carried:
            return None
        return self._entering(self.k, self.v, initial, 1.0, against=False)

    def grad_states(self, do: Tensor, d_final: Tensor | None) -> Tensor | None:
        """Gradients of the states that leave the units, [U, heads, ...]; None if nothing carries."""
        if not self.plan.carried:
            return None
        return self._entering(self.q, do, d_final, self.scale, against=True)

    def _entering(
        self, k: Tensor, v: Tensor, initial: Tensor | None, scale: float, *, against: bool
    ) -> Tensor:
        """The scan over units; ``against`` the order of the call, with the sweeps' shift 1."""
        heads, pieces = k.shape[2], 1 if self.packed else launch_config.PIECES
        groups, shape = heads // self.kv_heads, (heads, k.shape[3], v.shape[3])
        states = torch.empty(self.plan.units, *shape, dtype=torch.float32, device=k.device)
        added = states.new_empty(self.plan.units * pieces, *shape)
        cut = self.seq, self.plan.length // pieces, self.plan.segments * pieces
        tiles = launch_config.local_state_tiles(k.shape[3], v.shape[3], self.dtype)
        forms = {
            "PIECES": pieces, "K": k.shape[3], "V": v.shape[3], "PACKED": self.packed,
            "CONSTANT": self.log_decay is not None, "REVERSE": self.reverse != against,
        }  # fmt: skip
        launch(
            local_state_kernel, added.shape[0] * heads * -(-v.shape[3] // tiles.value_block),
            k, v, self.log_decay, added, self.table, *k.stride()[:3], *v.stride()[:3], *cut, heads,
            groups, scale, C=tiles.chunk, BD=tiles.key_block, BE=tiles.value_block,
            SHIFT=int(against), STAGES=tiles.stages, num_warps=tiles.warps, **forms,
            **self.arithmetic,
        )  # fmt: skip
        launch(
            carry_kernel, self.sequences * heads * -(-k.shape[3] * v.shape[3] // CARRY_BLOCK),
            added, states, initial, self.log_decay, self.first_unit, self.table, *cut, heads,
            groups, groups if against else 1, BLOCK=CARRY_BLOCK, INITIAL=initial is not None,
            **forms,
        )  # fmt: skip
        return states


def entry_of(units: Tensor | None, sequences: Tensor | None) -> tuple[Tensor | None, str]:
    """The states that enter units, and which: one a unit, one a sequence, or none."""
    if units is not None:
        return units, "unit"
    return sequences, "none" if sequences is None else "sequence"


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
    q, k, v = walkable(q), walkable(k), walkable(v)
    log_decay, initial_state = block(log_decay), block(initial_state)
    cu_seqlens = block(cu_seqlens)
    with device_of(q):
        call = Call(q, k, v, log_decay, cu_seqlens, scale, reverse)
        entry, kind = entry_of(call.states(initial_state), initial_state)
        o = q.new_empty(*q.shape[:3], call.value_dim)
        final = call.empty_states(call.kv_heads)
        tiles = call.sweep_tiles(call.key_dim, call.value_dim)
        launch(
            forward_kernel,
            call.plan.units * call.heads * -(-call.value_dim // tiles.value_block),
            q, k, v, log_decay, entry, o, final, call.table,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.cut, call.heads, call.groups,
            scale, K=call.key_dim, V=call.value_dim, C=tiles.chunk, BD=tiles.key_block,
            BE=tiles.value_block, ENTRY=kind, CONSTANT=log_decay is not None, PACKED=call.packed,
            REVERSE=reverse, STAGES=tiles.stages, num_warps=tiles.warps, **call.arithmetic,
        )  # fmt: skip
    return o, final


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
    q, k, v, do = walkable(q), walkable(k), walkable(v), walkable(do)
    log_decay, initial_state = block(log_decay), block(initial_state)
    cu_seqlens = block(cu_seqlens)
    d_final = block(d_final)
    with device_of(q):
        call = Call(q, k, v, log_decay, cu_seqlens, scale, reverse)
        entry = entry_of(call.states(initial_state), initial_state)
        grad_entry = entry_of(call.grad_states(do, d_final), d_final)
        d_initial = q.new_empty(0, dtype=torch.float32)
        if with_initial:
            d_initial = call.empty_states(call.heads)
        dq, dk, dv = _sweeps(call, do, entry, grad_entry, d_initial, with_initial)
        d_decay = q.new_empty(0)
        if with_decay and log_decay is not None:
            d_decay = decay_gradient(call, log_decay, do, entry, grad_entry)
    dk, dv = sum_groups(dk, 2, call.kv_heads), sum_groups(dv, 2, call.kv_heads)
    if with_initial:
        d_initial = sum_groups(d_initial, 1, call.kv_heads)
    return dq, dk, dv, d_decay, d_initial


def _sweeps(
    call: Call,
    do: Tensor,
    entry: tuple[Tensor | None, str],
    grad_entry: tuple[Tensor | None, str],
    d_initial: Tensor,
    with_initial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, the last two for each query head; fills d_initial."""
    q, k, v, log_decay = call.q, call.k, call.v, call.log_decay
    rows, key_dim, value_dim = q.shape[:3], call.key_dim, call.value_dim
    dq, dk, dv = (q.new_empty(*rows, dim) for dim in (key_dim, key_dim, value_dim))
    # One launch where the sweeps have the same shape.
    launches = ((0, 3),) if key_dim == value_dim else ((0, 2), (2, 1))
    for first, count in launches:
        dims = (key_dim, value_dim) if first == 2 else (value_dim, key_dim)
        tiles = call.sweep_tiles(*dims, backward=True)
        programs = count * call.plan.units * call.heads * -(-dims[1] // tiles.value_block)
        launch(
            backward_kernel, programs,
            q, k, v, do, log_decay, entry[0], grad_entry[0], dq, dk, dv, d_initial, call.table,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *call.cut,
            call.heads, call.groups, call.scale, K=key_dim, V=value_dim, FIRST=first, COUNT=count,
            D=dims[0], E=dims[1], C=tiles.chunk, BD=tiles.key_block, BE=tiles.value_block,
            ENTRY=entry[1], GRAD_ENTRY=grad_entry[1], D_INITIAL=with_initial and first + count == 3,
            CONSTANT=log_decay is not None, PACKED=call.packed, REVERSE=call.reverse,
            STAGES=tiles.stages, num_warps=tiles.warps, **call.arithmetic,
        )  # fmt: skip
    return dq, dk, dv


def decay_gradient(
    call: Call,
    log_decay: Tensor,
    do: Tensor,
    entry: tuple[Tensor | None, str],
    grad_entry: tuple[Tensor | None, str],
) -> Tensor:
    """The gradient of log_decay, [kv_heads] in its dtype; summed in float32."""
    q, k, v = call.q, call.k, call.v
    tiles = launch_config.gradient_tiles(call.key_dim, call.value_dim, call.dtype)
    slices = -(-call.value_dim // tiles.value_block)
    shape = (call.plan.units, call.kv_heads, call.groups * slices)
    shares = torch.empty(shape, dtype=torch.float32, device=k.device)
    launch(
        decay_gradient_kernel, shares.numel(),
        q, k, v, do, log_decay, entry[0], grad_entry[0], shares, call.table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *call.cut, call.heads,
        call.groups, call.scale, K=call.key_dim, V=call.value_dim, C=tiles.chunk,
        BD=tiles.key_block, BE=tiles.value_block, ENTRY=entry[1], GRAD_ENTRY=grad_entry[1],
        PACKED=call.packed, REVERSE=call.reverse, num_warps=tiles.warps, **call.arithmetic,
    )  # fmt: skip
    return shares.sum((0, 2)).to(log_decay.dtype)
