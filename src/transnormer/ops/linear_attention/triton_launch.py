"""Launches of the kernels for constant decay and scalar gates: what ``constant_decay``'s ops do.

Legend: U units (segments of all sequences).
"""

from typing import Any

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.constant_decay import Exchange, gpu_of, plan, plan_with_sums
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
from transnormer.ops.linear_attention.triton_scalar import gate_sums_kernel
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
        backward: bool = False,
        in_parts: bool = False,
    ) -> None:
        self.q, self.k, self.v, self.cu_seqlens = q, k, v, cu_seqlens
        self.scale, self.reverse, self.dtype = scale, reverse, q.dtype
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.groups = self.heads // self.kv_heads
        self.seq, self.key_dim, self.value_dim = k.shape[1], k.shape[3], v.shape[3]
        self.gpu = gpu_of(k.device)
        sums = plan_with_sums(k, self.heads) if in_parts else None
        self.plan = sums or plan(k, self.heads, cu_seqlens)
        self.sequences, self.packed = k.shape[0], cu_seqlens is not None
        self.table = self.first_unit = None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.table, self.first_unit = unit_table(cu_seqlens, self.seq, self.plan.length)
        self.arithmetic = arithmetic(q.dtype)
        self.gated, self.chunk = log_decay is not None and log_decay.dim() == 3, 0
        self.decay: dict[str, Any] = {
            "DECAY": "none" if log_decay is None else "constant",
            "PARTS": 1,
        }
        if self.gated:
            self.decay = {"DECAY": "gates", "PARTS": 1 if self.dtype == torch.bfloat16 else 2}
            dims = (self.key_dim, self.value_dim)
            cuts = [self.sweep_tiles(*dims, backward=backward).chunk]
            if backward:
                cuts.append(self.sweep_tiles(*dims[::-1], backward=True).chunk)
            # Sums of gates are the same in all sweeps.
            self.chunk = min(cuts)
            log_decay = self._gate_sums(log_decay)
        # What the kernels read: one number a head, or the sums of gates.
        self.log_decay = block(log_decay)

    def _gate_sums(self, gates: Tensor) -> Tensor:
        """Sums of gates over the chunks of units, float32 [batch, kv_heads, seq, parts]."""
        chunk, parts = self.chunk, self.decay["PARTS"]
        shape = (gates.shape[0], self.kv_heads, self.seq, parts)
        sums = torch.empty(shape, dtype=torch.float32, device=gates.device)
        heads = min(launch_config.block_of(self.kv_heads, 1), 32)
        chunks = -(-self.plan.length // chunk)
        launch(
            gate_sums_kernel, self.plan.units * chunks * -(-self.kv_heads // heads), gates, sums,
            self.table, *gates.stride(), *self.cut, self.kv_heads, chunks, C=chunk, BH=heads,
            PARTS=parts, PACKED=self.packed, REVERSE=self.reverse,
        )  # fmt: skip
        return sums

    @property
    def cut(self) -> tuple[int, int, int]:
        """T, L and SEGMENTS of the kernels."""
        return self.seq, self.plan.length, self.plan.segments

    def sweep_tiles(self, key_dim: int, value_dim: int, *, backward: bool = False) -> Tiles:
        """Tiles of a sweep with these dims."""
        rows = self.plan.units * self.heads
        tiles = launch_config.sweep_tiles(
            key_dim, value_dim, self.dtype, rows, self.gpu, backward=backward, gated=self.gated
        )
        return tiles._replace(chunk=self.chunk) if self.chunk else tiles

    def empty_states(self, heads: int) -> Tensor:
        """One state a sequence and head, float32, not filled."""
        shape = (self.sequences, heads, self.key_dim, self.value_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def empty_shares(self) -> Tensor:
        """Shares of the gates' gradient, [batch, heads, slices, seq]."""
        tiles = self.sweep_tiles(self.value_dim, self.key_dim, backward=True)
        slices = -(-self.key_dim // tiles.value_block)
        shape = (self.k.shape[0], self.heads, slices, self.seq)
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def empty_chunk_states(self) -> Tensor:
        """One state a chunk and query head; chunk n of a unit follows all before its token."""
        chunks = self.k.shape[0] * self.seq // self.chunk + self.plan.units
        # A float16 does not hold every state.
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        shape = (chunks, self.heads, self.key_dim, self.value_dim)
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def states(self, initial: Tensor | None, exchange: Exchange | None = None) -> Tensor | None:
        """States that enter the units, [U, kv_heads, key_dim, value_dim]; None if nothing carries.

        ``entry_of`` says which of them are filled.
        """
        if not self.plan.carried:
            return None
        return self._entering(self.k, self.v, initial, exchange, 1.0, against=False)

    def grad_states(
        self, do: Tensor, d_final: Tensor | None, exchange: Exchange | None = None
    ) -> Tensor | None:
        """Gradients of the states that leave the units, [U, heads, ...]; None if nothing carries.

        ``entry_of`` says which of them are filled.
        """
        if not self.plan.carried:
            return None
        return self._entering(self.q, do, d_final, exchange, self.scale, against=True)

    def _entering(
        self,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        exchange: Exchange | None,
        scale: float,
        *,
        against: bool,
    ) -> Tensor:
        """The scan over units; ``against`` the order of the call, with the sweeps' shift 1.

        Without an exchange from ``initial``, with one from what it returns; where there is neither, the
        unit at which a sequence's walk begins is not written.
        """
        heads, pieces = k.shape[2], self.plan.pieces
        groups, shape = heads // self.kv_heads, (heads, k.shape[3], v.shape[3])
        states = torch.empty(self.plan.units, *shape, dtype=torch.float32, device=k.device)
        added = states.new_empty(self.plan.units * pieces, *shape)
        cut = self.seq, self.plan.length // pieces, self.plan.segments * pieces
        tiles = launch_config.local_state_tiles(k.shape[3], v.shape[3], self.dtype, self.gpu)
        decays = None
        if self.gated:
            # Sums of gates are those of the sweeps' chunks.
            tiles = tiles._replace(chunk=self.chunk)
            decays = states.new_empty(added.shape[:2])
        forms = {
            "PIECES": pieces, "K": k.shape[3], "V": v.shape[3], "PACKED": self.packed,
            "DECAY": self.decay["DECAY"], "REVERSE": self.reverse != against,
        }  # fmt: skip
        launch(
            local_state_kernel, added.shape[0] * heads * -(-v.shape[3] // tiles.value_block),
            k, v, self.log_decay, added, decays, self.table, *k.stride()[:3], *v.stride()[:3], *cut,
            heads, groups, scale, PARTS=self.decay["PARTS"], C=tiles.chunk, BD=tiles.key_block,
            BE=tiles.value_block, SHIFT=int(against), STAGES=tiles.stages, num_warps=tiles.warps,
            WHOLE=exchange is not None, **forms, **self.arithmetic,
        )  # fmt: skip

        def carry(into: Tensor, *, total: bool) -> None:
            launch(
                carry_kernel, self.sequences * heads * -(-k.shape[3] * v.shape[3] // CARRY_BLOCK),
                added, into, initial, self.log_decay, decays, self.first_unit, self.table, *cut,
                heads, groups, groups if against else 1, BLOCK=CARRY_BLOCK,
                INITIAL=initial is not None, TOTAL=total, **forms,
            )  # fmt: skip

        if exchange is not None:
            leaving = self.empty_states(heads)
            carry(leaving, total=True)
            initial = exchange(leaving).contiguous()
        carry(states, total=False)
        return states


def entry_of(
    units: Tensor | None, sequences: Tensor | None, exchange: Exchange | None = None
) -> tuple[Tensor | None, str]:
    """The states that enter units, and which: see ``forward_kernel``."""
    if units is not None:
        given = sequences is not None or exchange is not None
        return units, "unit" if given else "later"
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
    found = forward_and_states(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse)
    return found[:2]


def forward_and_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs, final states, and what ``Call.states`` made, which a backward pass can take.

    ``exchange``: the tokens are a part of longer rows, and it finds the state that enters the part;
    then there are no initial_state and no cu_seqlens.
    """
    q, k, v = walkable(q), walkable(k), walkable(v)
    initial_state, cu_seqlens = block(initial_state), block(cu_seqlens)
    with device_of(q):
        in_parts = exchange is not None
        call = Call(q, k, v, log_decay, cu_seqlens, scale, reverse, in_parts=in_parts)
        states = call.states(initial_state, exchange)
        entry, kind = entry_of(states, initial_state, exchange)
        o = q.new_empty(*q.shape[:3], call.value_dim)
        final = call.empty_states(call.kv_heads)
        tiles = call.sweep_tiles(call.key_dim, call.value_dim)
        launch(
            forward_kernel,
            call.plan.units * call.heads * -(-call.value_dim // tiles.value_block),
            q, k, v, call.log_decay, entry, o, final, call.table,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.cut, call.heads, call.groups,
            scale, K=call.key_dim, V=call.value_dim, C=tiles.chunk, BD=tiles.key_block,
            BE=tiles.value_block, ENTRY=kind, PACKED=call.packed, REVERSE=reverse, STAGES=tiles.stages,
            num_warps=tiles.warps, **call.decay, **call.arithmetic,
        )  # fmt: skip
    return o, final, states


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
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    states: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and initial_state (the last two empty where not asked for).

    ``into``: where those of q, k and v are written, for as many kv heads as heads and equal dims:
    rows whose tokens lie one stride apart in all three and over the batch, heads side by side.
    ``states``: those of ``forward_and_states`` with the same initial_state and exchange, or neither;
    without, they are made again.
    ``exchange``: the tokens are a part of longer rows. It takes the gradient that they alone give the
    state that enters them, and returns that of the state that leaves them; then there is no d_final,
    ``states`` are given, and there are as many kv heads as heads.
    """
    q, k, v, do = walkable(q), walkable(k), walkable(v), walkable(do)
    initial_state, cu_seqlens, d_final = block(initial_state), block(cu_seqlens), block(d_final)
    with device_of(q):
        in_parts = exchange is not None
        call = Call(
            q, k, v, log_decay, cu_seqlens, scale, reverse, backward=True, in_parts=in_parts
        )
        assert exchange is None or states is not None
        states = call.states(initial_state) if states is None else states
        entry = entry_of(states, initial_state, exchange)
        grad_entry = entry_of(call.grad_states(do, d_final, exchange), d_final, exchange)
        d_initial = q.new_empty(0, dtype=torch.float32)
        if with_initial:
            d_initial = call.empty_states(call.heads)
        with_decay = with_decay and log_decay is not None
        d_gates = call.empty_shares() if call.gated and with_decay else None
        dq, dk, dv = _sweeps(call, do, entry, grad_entry, d_initial, with_initial, d_gates, into)
        d_decay = q.new_empty(0)
        if with_decay and log_decay is not None:
            if d_gates is None:
                d_decay = decay_gradient(call, log_decay, do, entry, grad_entry)
            else:
                d_decay = d_gates.unflatten(1, (call.kv_heads, call.groups)).sum((2, 3)).mT
                d_decay = d_decay.to(log_decay.dtype).contiguous()
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
    d_gates: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, the last two for each query head; fills d_initial and d_gates."""
    q, k, v = call.q, call.k, call.v
    rows, key_dim, value_dim = q.shape[:3], call.key_dim, call.value_dim
    dq, dk, dv = into or [q.new_empty(*rows, dim) for dim in (key_dim, key_dim, value_dim)]
    states = None if d_gates is None else call.empty_chunk_states()
    # The stride along a dim of size 1 says nothing.
    walk = 1 if call.seq > 1 else 0
    # One launch where the sweeps have the same shape; with gates, q's comes after k's.
    launches = ((0, 3),) if key_dim == value_dim else ((0, 2), (2, 1))
    if call.gated:
        launches = ((1, 2), (0, 1)) if key_dim == value_dim else ((2, 1), (1, 1), (0, 1))
    for first, count in launches:
        dims = (key_dim, value_dim) if first == 2 else (value_dim, key_dim)
        tiles = call.sweep_tiles(*dims, backward=True)
        programs = count * call.plan.units * call.heads * -(-dims[1] // tiles.value_block)
        launch(
            backward_kernel, programs,
            q, k, v, do, call.log_decay, entry[0], grad_entry[0], dq, dk, dv, d_initial, d_gates,
            states, call.table,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            (dv if first == 2 else dq).stride(walk), *call.cut,
            call.heads, call.groups, call.scale, K=key_dim, V=value_dim, FIRST=first, COUNT=count,
            D=dims[0], E=dims[1], C=tiles.chunk, BD=tiles.key_block, BE=tiles.value_block,
            ENTRY=entry[1], GRAD_ENTRY=grad_entry[1], D_INITIAL=with_initial and first + count == 3,
            D_GATES=d_gates is not None and first < 2, PACKED=call.packed, REVERSE=call.reverse,
            STAGES=tiles.stages, num_warps=tiles.warps, **call.decay, **call.arithmetic,
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
        q, k, v, do, call.log_decay, entry[0], grad_entry[0], shares, call.table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *call.cut, call.heads,
        call.groups, call.scale, K=call.key_dim, V=call.value_dim, C=tiles.chunk,
        BD=tiles.key_block, BE=tiles.value_block, ENTRY=entry[1], GRAD_ENTRY=grad_entry[1],
        PACKED=call.packed, REVERSE=call.reverse, num_warps=tiles.warps, **call.arithmetic,
    )  # fmt: skip
    return shares.sum((0, 2)).to(log_decay.dtype)
