"""Launches of the kernels for constant decay and scalar gates: what ``constant_decay``'s ops do.

Legend: U units (segments of all sequences).
"""

from typing import Any

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.constant_decay import Exchange
from transnormer.ops.linear_attention.triton_constant import (
    backward_kernel,
    carry_kernel,
    forward_kernel,
    local_state_kernel,
)
from transnormer.ops.linear_attention.triton_decay_gradient import decay_gradient_kernel
from transnormer.ops.linear_attention.triton_form import form_of
from transnormer.ops.linear_attention.triton_runtime import (
    CARRY_BLOCK,
    block,
    device_of,
    sum_groups,
    walkable,
)
from transnormer.ops.linear_attention.triton_scalar import gate_sums_kernel
from transnormer.ops.linear_attention.triton_units import unit_table


class Call:
    """Tensors of one call and its form. q, k, v: last dim contiguous; the rest: contiguous."""

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
        self.q, self.k, self.v = q, k, v
        self.form = form = form_of(
            q, k, v, log_decay, cu_seqlens, scale, reverse, backward=backward, in_parts=in_parts
        )
        self.table = self.first_unit = None
        if cu_seqlens is not None:
            self.table, self.first_unit = unit_table(cu_seqlens, form.seq, form.plan.length)
        # What the kernels read: one number a head, or the sums of gates.
        self.log_decay = self._gate_sums(log_decay) if form.gated else block(log_decay)

    def _gate_sums(self, gates: Tensor | None) -> Tensor:
        """Sums of gates over the chunks of units, float32 [batch, kv_heads, seq, parts]."""
        assert gates is not None
        form, parts = self.form, self.form.decay["PARTS"]
        sums = gates.new_empty(form.batch, form.kv_heads, form.seq, parts, dtype=torch.float32)

        def rest() -> Any:
            heads = min(launch_config.block_of(form.kv_heads, 1), 32)
            chunks = -(-form.plan.length // form.chunk)
            programs = form.plan.units * chunks * -(-form.kv_heads // heads)
            numbers = *gates.stride(), *form.cut, form.kv_heads, chunks
            constants = {
                "C": form.chunk, "BH": heads, "PARTS": parts, "PACKED": form.packed,
                "REVERSE": form.reverse,
            }  # fmt: skip
            return gate_sums_kernel, programs, numbers, constants

        form.launch(("gate_sums", gates.stride()), (gates, sums, self.table), rest)
        return sums

    def empty_states(self, heads: int) -> Tensor:
        """One state a sequence and head, float32, not filled."""
        form = self.form
        shape = (form.sequences, heads, form.key_dim, form.value_dim)
        return self.k.new_empty(shape, dtype=torch.float32)

    def empty_shares(self) -> Tensor:
        """Shares of the gates' gradient, [batch, heads, slices, seq]."""
        form = self.form
        tiles = form.sweep_tiles(form.value_dim, form.key_dim, backward=True)
        slices = -(-form.key_dim // tiles.value_block)
        return self.k.new_empty(form.batch, form.heads, slices, form.seq, dtype=torch.float32)

    def empty_chunk_states(self) -> Tensor:
        """One state a chunk and query head; chunk n of a unit follows all before its token."""
        form = self.form
        chunks = form.batch * form.seq // form.chunk + form.plan.units
        # A float16 does not hold every state.
        dtype = torch.float32 if form.dtype == torch.float16 else form.dtype
        return self.k.new_empty(chunks, form.heads, form.key_dim, form.value_dim, dtype=dtype)

    def states(self, initial: Tensor | None, exchange: Exchange | None = None) -> Tensor | None:
        """States that enter the units, [U, kv_heads, key_dim, value_dim]; None if nothing carries.

        ``entry_of`` says which of them are filled.
        """
        if not self.form.plan.carried:
            return None
        return self._entering(self.k, self.v, initial, exchange, 1.0, against=False)

    def grad_states(
        self, do: Tensor, d_final: Tensor | None, exchange: Exchange | None = None
    ) -> Tensor | None:
        """Gradients of the states that leave the units, [U, heads, ...]; None if nothing carries.

        ``entry_of`` says which of them are filled.
        """
        if not self.form.plan.carried:
            return None
        return self._entering(self.q, do, d_final, exchange, self.form.scale, against=True)

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
        form, plan, heads = self.form, self.form.plan, k.shape[2]
        groups, shape = heads // form.kv_heads, (heads, k.shape[3], v.shape[3])
        states = k.new_empty(plan.units, *shape, dtype=torch.float32)
        added = states.new_empty(plan.units * plan.pieces, *shape)
        cut = form.seq, plan.length // plan.pieces, plan.segments * plan.pieces
        # Sums of gates are those of the sweeps' chunks.
        decays = states.new_empty(added.shape[:2]) if form.gated else None
        forms = {
            "PIECES": plan.pieces, "K": k.shape[3], "V": v.shape[3], "PACKED": form.packed,
            "DECAY": form.decay["DECAY"], "REVERSE": form.reverse != against,
        }  # fmt: skip

        def local() -> Any:
            tiles = launch_config.local_state_tiles(k.shape[3], v.shape[3], form.dtype, form.gpu)
            chunk = form.chunk or tiles.chunk
            programs = added.shape[0] * heads * -(-v.shape[3] // tiles.value_block)
            numbers = *k.stride()[:3], *v.stride()[:3], *cut, heads, groups, scale
            constants = {
                "PARTS": form.decay["PARTS"], "C": chunk, "BD": tiles.key_block,
                "BE": tiles.value_block, "SHIFT": int(against), "STAGES": tiles.stages,
                "num_warps": tiles.warps, "WHOLE": exchange is not None, **forms,
                **form.arithmetic,
            }  # fmt: skip
            return local_state_kernel, programs, numbers, constants

        variant = against, k.stride(), v.stride(), v.dtype, exchange is not None
        given = k, v, self.log_decay, added, decays, self.table
        form.launch(("local_state", *variant), given, local)

        def carry(into: Tensor, *, total: bool) -> None:
            def rest() -> Any:
                programs = form.sequences * heads * -(-k.shape[3] * v.shape[3] // CARRY_BLOCK)
                numbers = *cut, heads, groups, groups if against else 1
                constants = {"BLOCK": CARRY_BLOCK, "INITIAL": initial is not None, "TOTAL": total}
                return carry_kernel, programs, numbers, constants | forms

            given = added, into, initial, self.log_decay, decays, self.first_unit, self.table
            form.launch(("carry", against, total, dtype_of(initial)), given, rest)

        if exchange is not None:
            leaving = self.empty_states(heads)
            carry(leaving, total=True)
            initial = exchange(leaving).contiguous()
        carry(states, total=False)
        return states


def dtype_of(x: Tensor | None) -> torch.dtype | None:
    """Its dtype, if there is one."""
    return None if x is None else x.dtype


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
        form, states = call.form, call.states(initial_state, exchange)
        entry, kind = entry_of(states, initial_state, exchange)
        o = q.new_empty(*q.shape[:3], form.value_dim)
        final = call.empty_states(form.kv_heads)

        def rest() -> Any:
            tiles = form.sweep_tiles(form.key_dim, form.value_dim)
            programs = form.plan.units * form.heads * -(-form.value_dim // tiles.value_block)
            strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
            constants = {
                "K": form.key_dim, "V": form.value_dim, "C": tiles.chunk, "BD": tiles.key_block,
                "BE": tiles.value_block, "ENTRY": kind, "PACKED": form.packed, "REVERSE": reverse,
                "STAGES": tiles.stages, "num_warps": tiles.warps, **form.decay, **form.arithmetic,
            }  # fmt: skip
            numbers = *strides, *form.cut, form.heads, form.groups, scale
            return forward_kernel, programs, numbers, constants

        given = q, k, v, call.log_decay, entry, o, final, call.table
        form.launch(("forward", kind, dtype_of(entry)), given, rest)
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
    rows whose tokens lie a number of heads apart, one in all three and over the batch, heads side by
    side.
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
            d_initial = call.empty_states(call.form.heads)
        with_decay = with_decay and log_decay is not None
        d_gates = call.empty_shares() if call.form.gated and with_decay else None
        dq, dk, dv = _sweeps(call, do, entry, grad_entry, d_initial, with_initial, d_gates, into)
        d_decay = q.new_empty(0)
        if with_decay and log_decay is not None:
            if d_gates is None:
                d_decay = decay_gradient(call, log_decay, do, entry, grad_entry)
            else:
                heads = (call.form.kv_heads, call.form.groups)
                d_decay = d_gates.unflatten(1, heads).sum((2, 3)).mT
                d_decay = d_decay.to(log_decay.dtype).contiguous()
    dk, dv = sum_groups(dk, 2, k.shape[2]), sum_groups(dv, 2, k.shape[2])
    if with_initial:
        d_initial = sum_groups(d_initial, 1, k.shape[2])
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
    form, q, k, v = call.form, call.q, call.k, call.v
    rows, key_dim, value_dim = q.shape[:3], form.key_dim, form.value_dim
    dq, dk, dv = into or [q.new_empty(*rows, dim) for dim in (key_dim, key_dim, value_dim)]
    states = None if d_gates is None else call.empty_chunk_states()
    # The stride along a dim of size 1 says nothing.
    walk = 1 if form.seq > 1 else 0
    # One launch where the sweeps have the same shape; with gates, q's comes after k's.
    launches = ((0, 3),) if key_dim == value_dim else ((0, 2), (2, 1))
    if form.gated:
        launches = ((1, 2), (0, 1)) if key_dim == value_dim else ((2, 1), (1, 1), (0, 1))
    given = (
        q, k, v, do, call.log_decay, entry[0], grad_entry[0], dq, dk, dv, d_initial, d_gates, states,
        call.table,
    )  # fmt: skip
    for first, count in launches:
        out, dim = (dv, value_dim) if first == 2 else (dq, key_dim)
        out_heads = out.stride(walk) // dim

        def rest(first: int = first, count: int = count, out_heads: int = out_heads) -> Any:
            dims = (key_dim, value_dim) if first == 2 else (value_dim, key_dim)
            tiles = form.sweep_tiles(*dims, backward=True)
            programs = count * form.plan.units * form.heads * -(-dims[1] // tiles.value_block)
            strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]
            numbers = *strides, out_heads, *form.cut, form.heads, form.groups, form.scale
            constants = {
                "K": key_dim, "V": value_dim, "FIRST": first, "COUNT": count, "D": dims[0],
                "E": dims[1], "C": tiles.chunk, "BD": tiles.key_block, "BE": tiles.value_block,
                "ENTRY": entry[1], "GRAD_ENTRY": grad_entry[1],
                "D_INITIAL": with_initial and first + count == 3,
                "D_GATES": d_gates is not None and first < 2, "PACKED": form.packed,
                "REVERSE": form.reverse, "STAGES": tiles.stages, "num_warps": tiles.warps,
                **form.decay, **form.arithmetic,
            }  # fmt: skip
            return backward_kernel, programs, numbers, constants

        kinds = entry[1], dtype_of(entry[0]), grad_entry[1], dtype_of(grad_entry[0])
        sides = do.stride(), do.dtype, out_heads, dq.dtype, with_initial, d_gates is not None
        form.launch(("backward", first, *kinds, *sides), given, rest)
    return dq, dk, dv


def decay_gradient(
    call: Call,
    log_decay: Tensor,
    do: Tensor,
    entry: tuple[Tensor | None, str],
    grad_entry: tuple[Tensor | None, str],
) -> Tensor:
    """The gradient of log_decay, [kv_heads] in its dtype; summed in float32."""
    form, q, k, v = call.form, call.q, call.k, call.v
    tiles = launch_config.gradient_tiles(form.key_dim, form.value_dim, form.dtype)
    slices = -(-form.value_dim // tiles.value_block)
    shape = (form.plan.units, form.kv_heads, form.groups * slices)
    shares = k.new_empty(shape, dtype=torch.float32)

    def rest() -> Any:
        strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]
        numbers = *strides, *form.cut, form.heads, form.groups, form.scale
        constants = {
            "K": form.key_dim, "V": form.value_dim, "C": tiles.chunk, "BD": tiles.key_block,
            "BE": tiles.value_block, "ENTRY": entry[1], "GRAD_ENTRY": grad_entry[1],
            "PACKED": form.packed, "REVERSE": form.reverse, "num_warps": tiles.warps,
            **form.arithmetic,
        }  # fmt: skip
        return decay_gradient_kernel, shares.numel(), numbers, constants

    given = q, k, v, do, call.log_decay, entry[0], grad_entry[0], shares, call.table
    kinds = entry[1], dtype_of(entry[0]), grad_entry[1], dtype_of(grad_entry[0])
    form.launch(("decay_gradient", *kinds, do.stride(), do.dtype), given, rest)
    return shares.sum((0, 2)).to(log_decay.dtype)
