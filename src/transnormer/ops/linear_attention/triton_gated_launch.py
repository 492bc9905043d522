"""Launches of the kernels for key gates: what the ops of ``gated_decay`` do."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.constant_decay import gpu_of
from transnormer.ops.linear_attention.gated_decay import Walks, chunks_of, walks_of
from transnormer.ops.linear_attention.launch_config import Tiles
from transnormer.ops.linear_attention.triton_gated import (
    carry_walks_kernel,
    gates_kernel,
    level_kernel,
    states_kernel,
    sweep_kernel,
)
from transnormer.ops.linear_attention.triton_gated_gradient import (
    value_gradient_kernel,
)
from transnormer.ops.linear_attention.triton_key_gradient import key_gradient_kernel
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


class Prepared(NamedTuple):
    """What ``gates_kernel`` makes of the chunks."""

    scores: Tensor
    entering: Tensor
    leaving: Tensor
    first: Tensor
    total: Tensor
    log_total: Tensor
    halves: Tensor
    near: Tensor
    levels: Tensor


class Call:
    """What the launches of one call share. Last dims of all tensors are contiguous."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        reverse: bool,
    ) -> None:
        self.q, self.k, self.v, self.gates = q, k, v, gates
        self.scale, self.reverse, self.dtype = scale, reverse, q.dtype
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.groups = self.heads // self.kv_heads
        self.batch, self.seq, self.key_dim, self.value_dim = *k.shape[:2], k.shape[3], v.shape[3]
        gpu = gpu_of(k.device)
        self.tiles = launch_config.gated_tiles(self.key_dim, self.value_dim, self.dtype, gpu)
        self.chunks = chunks_of(k, self.tiles.chunk, cu_seqlens)
        self.sequences, self.packed = self.batch, cu_seqlens is not None
        self.table = self.first_unit = None
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            self.table, self.first_unit = unit_table(cu_seqlens, self.seq, self.tiles.chunk)
        # Made anew each time: what a CUDA graph makes must not serve other calls.
        self.ones = torch.ones(self.tiles.chunk, dtype=torch.float16, device=k.device)
        # A float16 holds neither every score nor every state.
        self.wide = torch.float32 if self.dtype == torch.float16 else self.dtype
        exact = arithmetic(q.dtype)
        self.exact = exact
        self.arithmetic = {name: exact[name] for name in ("DTYPE", "PRECISION")}
        narrow = self.dtype == torch.bfloat16
        # The range of a float16, or the digits of a float32 sum, allow less.
        self.gating = {"PARTS": 1 if narrow else 2, "LIMIT": 60.0 if narrow else 8.0}
        self.forms = {
            "K": self.key_dim, "C": self.tiles.chunk, "PACKED": self.packed, "REVERSE": reverse,
        }  # fmt: skip

    @property
    def levels(self) -> int:
        """Halvings of a chunk."""
        return self.tiles.chunk.bit_length() - 1

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Not filled."""
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def prepare(self) -> Prepared:
        """Scores, decayed tokens and decays of all chunks."""
        q, k, g, tiles = self.q, self.k, self.gates, self.tiles.gates
        count, chunk, heads = self.chunks.count, tiles.chunk, self.kv_heads
        made = Prepared(
            scores=self.empty(count, self.heads, chunk, chunk, dtype=self.wide),
            entering=self.empty(count, self.heads, chunk, self.key_dim, dtype=self.dtype),
            leaving=self.empty(count, heads, chunk, self.key_dim, dtype=self.dtype),
            first=self.empty(count, heads, self.key_dim, dtype=torch.float32),
            total=self.empty(count, heads, self.key_dim, dtype=torch.float32),
            log_total=self.empty(count, heads, self.key_dim, dtype=torch.float32),
            halves=self.empty(count, heads, 2, self.key_dim, dtype=torch.float32),
            near=self.empty(count, heads, dtype=torch.int32),
            levels=self.empty(count, heads, -(-self.key_dim // tiles.key_block), dtype=torch.int32),
        )
        shapes = (
            self.table, *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], self.seq,
            self.chunks.row, self.heads, self.groups,
        )  # fmt: skip
        forms = {"BK": tiles.key_block, "num_warps": tiles.warps, "num_stages": tiles.stages}
        forms |= self.gating | self.forms | self.arithmetic
        programs = count * self.heads
        launch(gates_kernel, programs, q, k, g, self.ones, *made[:-1], *shapes, **forms)
        launch(
            level_kernel, programs, q, k, g, self.ones, made.scores, made.near, made.levels,
            *shapes, LEVELS=self.levels, **forms,
        )  # fmt: skip
        return made

    def walks(self, tiles: Tiles, heads: int, *, whole_keys: bool) -> Walks:
        """Walks of a sweep with such tiles."""
        slices = -(-self.value_dim // tiles.value_block)
        if whole_keys:
            return walks_of(self.k, self.chunks, heads * slices)
        programs = heads * slices * -(-self.key_dim // tiles.key_block)
        return walks_of(self.k, self.chunks, -(-programs // launch_config.STATE_PROGRAMS))

    def states(
        self, made: Prepared, initial: Tensor | None, entry: Tensor | None, walks: Walks,
        *, ends: bool, do: Tensor | None = None, final: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """States before all chunks, or (``ends``) after all walks with the logs of their decays.

        With do those of the gradient, against the order of the call; final gets where it ends.
        """
        a, b, groups = (made.leaving, self.v, 1) if do is None else (made.entering, do, self.groups)
        heads, tiles, decays = b.shape[2], self.tiles.states, None
        states_of = walks.count if ends else self.chunks.count
        states = self.empty(
            states_of, heads, self.key_dim, self.value_dim,
            dtype=torch.float32 if ends else self.wide,
        )  # fmt: skip
        if ends:
            decays = self.empty(walks.count, heads, self.key_dim, dtype=torch.float32)
        slices = -(-self.key_dim // tiles.key_block) * -(-self.value_dim // tiles.value_block)
        launch(
            states_kernel, walks.count * heads * slices, a, b, made.first, made.total, made.log_total,
            initial, entry, states, final, decays, self.table, self.first_unit, *b.stride()[:3],
            *self.cut(walks), heads, groups, self.scale, V=self.value_dim, BD=tiles.key_block,
            BE=tiles.value_block, ENDS=ends,
            FINAL=final is not None, GRADIENT=do is not None, INITIAL=initial is not None,
            CARRIED=entry is not None, STAGES=tiles.stages, num_warps=tiles.warps, **self.forms,
            **self.exact,
        )  # fmt: skip
        return states, decays

    def cut(self, walks: Walks) -> tuple[int, int, int, int, int]:
        """T, CHUNKS, M, SEGMENTS and N of the kernels."""
        return self.seq, self.chunks.row, walks.length, walks.segments, self.sequences

    def entry(
        self, made: Prepared, initial: Tensor | None, walks: Walks, *, do: Tensor | None = None
    ) -> Tensor | None:
        """States that enter walks, [walks, heads, key_dim, value_dim]; None if nothing carries."""
        if walks.segments == 1:
            return None
        ends, decays = self.states(made, initial, None, walks, ends=True, do=do)
        entry, heads = torch.empty_like(ends), ends.shape[1]
        # Packed sequences take up their initial states within walks.
        begins = None if self.packed else initial
        blocks = -(-self.key_dim * self.value_dim // CARRY_BLOCK)
        launch(
            carry_walks_kernel, self.batch * heads * blocks, ends, decays, begins, entry,
            walks.segments, heads, 1 if do is None else self.groups, K=self.key_dim,
            V=self.value_dim, BLOCK=CARRY_BLOCK, INITIAL=begins is not None,
            AGAINST=self.reverse != (do is not None),
        )  # fmt: skip
        return entry

    def chunk_states(
        self, made: Prepared, initial: Tensor | None, *, do: Tensor | None = None,
        final: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """States before all chunks, [chunks, heads, key_dim, value_dim]; see ``states``."""
        heads = self.kv_heads if do is None else self.heads
        walks = self.walks(self.tiles.states, heads, whole_keys=False)
        entry = self.entry(made, initial, walks, do=do)
        return self.states(made, initial, entry, walks, ends=False, do=do, final=final)[0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final states."""
    q, k, v, gates = walkable(q), walkable(k), walkable(v), walkable(log_decay)
    initial_state, cu_seqlens = block(initial_state), block(cu_seqlens)
    with device_of(q):
        call = Call(q, k, v, gates, cu_seqlens, scale, reverse)
        made, tiles = call.prepare(), call.tiles.sweep
        walks = call.walks(tiles, call.heads, whole_keys=True)
        entry = call.entry(made, initial_state, walks)
        o = q.new_empty(*q.shape[:3], call.value_dim)
        final = call.empty(
            call.sequences, call.kv_heads, call.key_dim, call.value_dim, dtype=torch.float32
        )
        slices = -(-call.value_dim // tiles.value_block)
        launch(
            sweep_kernel, walks.count * call.heads * slices, made.entering, made.leaving,
            made.scores, v, made.first, made.total, made.log_total, initial_state, entry, o, final,
            call.table, call.first_unit, *v.stride()[:3], *call.cut(walks), call.heads, call.groups,
            scale, V=call.value_dim, BD=tiles.key_block, BE=tiles.value_block,
            INITIAL=initial_state is not None,
            CARRIED=entry is not None, STAGES=tiles.stages, num_warps=tiles.warps, **call.forms,
            **call.exact,
        )  # fmt: skip
    return o, final


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    with_decay: bool,
    with_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and initial_state (the last two empty where not asked for)."""
    q, k, v, do, gates = (walkable(x) for x in (q, k, v, do, log_decay))
    initial_state, cu_seqlens, d_final = block(initial_state), block(cu_seqlens), block(d_final)
    with device_of(q):
        call = Call(q, k, v, gates, cu_seqlens, scale, reverse)
        d_initial: Tensor | None = None
        if with_initial:
            d_initial = call.empty(
                call.sequences, call.heads, call.key_dim, call.value_dim, dtype=torch.float32
            )
        made = call.prepare()
        states = call.chunk_states(made, initial_state)
        out_states = call.chunk_states(made, d_final, do=do, final=d_initial)
        dv, d_scores = _value_gradient(call, made, do, out_states)
        dq, dk, dg = _key_gradient(call, made, do, d_scores, states, out_states, with_decay)
    dk, dv = sum_groups(dk, 2, call.kv_heads), sum_groups(dv, 2, call.kv_heads)
    dg = q.new_empty(0) if dg is None else sum_groups(dg, 2, call.kv_heads).to(log_decay.dtype)
    if d_initial is None:
        d_initial = q.new_empty(0, dtype=torch.float32)
    else:
        d_initial = sum_groups(d_initial, 1, call.kv_heads)
    return dq, dk, dv, dg, d_initial


def _value_gradient(
    call: Call, made: Prepared, do: Tensor, out_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the values, for each query head, and of the scores."""
    v, tiles = call.v, call.tiles.values
    dv, d_scores = v.new_empty(*call.q.shape[:3], call.value_dim), torch.empty_like(made.scores)
    launch(
        value_gradient_kernel, call.chunks.count * call.heads, made.leaving, made.scores, v, do,
        out_states, d_scores, dv, call.table, *v.stride()[:3], *do.stride()[:3], call.seq,
        call.chunks.row, call.heads, call.groups, call.scale, V=call.value_dim, BK=tiles.key_block,
        BV=tiles.value_block, num_warps=tiles.warps, num_stages=tiles.stages, **call.forms, **call.arithmetic,
    )  # fmt: skip
    return dv, d_scores


def _key_gradient(
    call: Call,
    made: Prepared,
    do: Tensor,
    d_scores: Tensor,
    states: Tensor,
    out_states: Tensor,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, and for each query head of k and log_decay (None where not asked for)."""
    q, k, v, g, tiles = call.q, call.k, call.v, call.gates, call.tiles.keys
    dq, dk = (q.new_empty(*q.shape[:3], call.key_dim) for _ in range(2))
    dg: Any = None
    if with_decay:
        dg = q.new_empty(*q.shape[:3], call.key_dim, dtype=torch.float32)
    made_of = (d_scores, states, out_states, dq, dk, dg, call.table, *q.stride()[:3])
    shapes = (
        *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *g.stride()[:3], call.seq,
        call.chunks.row, call.heads, call.groups, call.scale,
    )  # fmt: skip
    forms = {"V": call.value_dim, "LEVELS": call.levels, "WITH_DECAY": with_decay}
    forms |= call.forms | call.arithmetic
    for near in (True, False):
        own = tiles if near else call.tiles.levels
        blocks = -(-call.key_dim // own.key_block)
        launch(
            key_gradient_kernel, call.chunks.count * call.heads * blocks, q, k, v, do, g, call.ones,
            made.first, made.halves, made.near, made.levels, *made_of, *shapes, BK=own.key_block, BV=own.value_block,
            BN=call.tiles.gates.key_block, NEAR=near, PARTS=call.gating["PARTS"],
            num_warps=own.warps, num_stages=own.stages, **forms,
        )  # fmt: skip
    return dq, dk, dg
