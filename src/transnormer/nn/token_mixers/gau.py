"""The gated attention unit of FLASH: attention and gated linear unit in one layer."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.block_attention import block_attention, empty_block
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.rotary import Rotary
from transnormer.nn.state import KVState, zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype

# Widest value_dim for which the op has kernels with room to spare.
_VALUE_DIM = 256


class GauConfig(TokenMixerBase):
    """Gated attention unit; the defaults are the linear form of TransNormerLLM's baseline.

    It holds its own gated linear unit: a block has no channel mixer beside it.

    Attributes:
        form: "linear" (FLASH: quadratic inside chunks, linear between them, constant state) or
            "quad" (FLASH-quad: all tokens see each other; the state grows).
        hidden_dim: width of u and v; None is twice model_dim.
        key_dim: width of queries and keys, even.
        chunk_size: tokens of a chunk of the linear form.
        divisor: n in relu^2(q k^T / n + b) and in the sum between chunks; None is chunk_size for
            the linear form (released code) and 512 for the quadratic one (the length it was
            published with). The paper divides by the current length, which a causal model must not.
        bias: of all projections.
    """

    kind: Literal["gau"] = "gau"
    form: Literal["linear", "quad"] = "linear"
    hidden_dim: int | None = Field(default=None, ge=1)
    key_dim: int = Field(default=128, ge=2)
    chunk_size: int = Field(default=64, ge=1)
    divisor: int | None = Field(default=None, ge=1)
    bias: bool = True

    def build(self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool) -> "Gau":
        return Gau(self, model_dim, causal=causal)


class GauState(NamedTuple):
    """State of the linear form, of constant size.

    Attributes:
        keys: of the chunk that is not full yet, [rows, chunk_size, 1, 2 * key_dim]: those of the
            quadratic and those of the linear term, rotated already, in the activations' dtype.
        values: of that chunk, [rows, chunk_size, 1, hidden_dim].
        valid: bool [rows, chunk_size], the slots that hold a token.
        sums: sum over all tokens of linear key times value, [rows, groups, key_dim,
            hidden_dim / groups] in float32 (float64 for a float64 model).
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    sums: Tensor


class Gau(TokenMixer):
    """One layer of FLASH (Hua et al. 2022, arXiv:2202.10447, sections 2 and 3).

    u, v, z = silu(x W_uvz);  q, k = rope(g * z + c), a pair (g, c) each;
    A = relu^2(q k^T / n + b), causal;  y = (u * (A v)) W_o.
    The quadratic form has A over all tokens and b_ts = <rope(a, t), rope(b, s)>, the paper's bias
    for long sequences, which has no maximal distance. The linear form has A inside chunks of
    chunk_size tokens, with a learned b for each distance in them, and adds l_t sum_s m_s^T v_s / n
    over all chunks before (all chunks where not causal) with a second pair l, m of queries and keys.
    Chunks begin at every chunk_size-th real token, see ``block_attention``.

    A, and what it is made of, is computed in float32 (float64 for a float64 model) and rounded to
    the activations' dtype. The sum before the chunk is the running sum of linear attention without
    the chunk's own part, which is taken off inside A. The state is a ``GauState``, or a ``KVState``
    for the quadratic form.
    """

    def __init__(self, config: GauConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.linear = config.form == "linear"
        self.hidden_dim = config.hidden_dim or 2 * model_dim
        self.divisor = config.divisor or (config.chunk_size if self.linear else 512)
        self.uvz_proj = nn.Linear(model_dim, 2 * self.hidden_dim + config.key_dim, bias=config.bias)
        self.out_proj = nn.Linear(self.hidden_dim, model_dim, bias=config.bias)
        self.rotary = Rotary(config.key_dim)
        pairs = 4 if self.linear else 2
        self.scales = nn.Parameter(torch.empty(pairs, config.key_dim))
        self.offsets = nn.Parameter(torch.empty(pairs, config.key_dim))
        if self.linear:
            distances = config.chunk_size if causal else 2 * config.chunk_size - 1
            self.distance_bias = nn.Parameter(torch.empty(distances))
            self.core = LinearAttentionCore(causal=causal)
            # The values of one head, wider than kernels take, are as good as several heads'.
            dim = self.hidden_dim
            self.groups = next(
                g for g in range(1, dim + 1) if not dim % g and dim <= _VALUE_DIM * g
            )
        else:
            self.rotary_bias = nn.Parameter(torch.empty(2, config.key_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """g and the biases N(0, 0.02^2), c 0, as released."""
        nn.init.normal_(self.scales, std=0.02)
        nn.init.zeros_(self.offsets)
        nn.init.normal_(self.distance_bias if self.linear else self.rotary_bias, std=0.02)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: GauState | KVState | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, GauState | KVState | None]:
        key_dim = self.config.key_dim
        u, v, z = F.silu(self.uvz_proj(x)).split([self.hidden_dim, self.hidden_dim, key_dim], -1)
        pairs = (z[:, :, None] * self.scales + self.offsets).to(v.dtype)
        rotated = self.rotary((pairs,), positions)[0].split(1, 2)
        v = v[:, :, None]
        if self.linear:
            assert state is None or isinstance(state, GauState)
            o, state = self._linear(rotated, v, cu_seqlens, mask, state)
        else:
            assert state is None or isinstance(state, KVState)
            o, state = self._quadratic(rotated, v, positions, cu_seqlens, mask, state)
        return self.out_proj(u * o.flatten(2)), state

    def _linear(
        self,
        rotated: tuple[Tensor, ...],
        v: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        state: GauState | None,
    ) -> tuple[Tensor, GauState | None]:
        q, k, linear_q, linear_k = rotated
        linear_q = linear_q / self.divisor
        local, block = block_attention(
            torch.cat([q, linear_q], -1),
            torch.cat([k, linear_k], -1),
            v,
            self._local,
            block_size=self.config.chunk_size,
            causal=self.causal,
            state=None if state is None else KVState(*state[:3]),
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        far, sums = self.core(
            linear_q.expand(-1, -1, self.groups, -1),
            linear_k.expand(-1, -1, self.groups, -1),
            v.flatten(2).unflatten(2, (self.groups, -1)),
            None,
            state=None if state is None else state.sums,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        o = local + far.flatten(2)[:, :, None]
        return o, None if block is None or sums is None else GauState(*block, sums)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
        """A of one chunk times v, less the chunk's own part of the linear term where causal."""
        (q, linear_q), (k, linear_k) = q.chunk(2, -1), k.chunk(2, -1)
        # Weights are small differences of larger terms: rounded once, at the end.
        dtype = accumulation_dtype(v.dtype)
        bias = self.distance_bias.to(dtype)
        bias = bias[distance.clamp(min=0) if self.causal else distance + self.config.chunk_size - 1]
        scores = (q @ k.transpose(-1, -2)).to(dtype)
        weights = (scores / self.divisor + bias).relu().square()
        if self.causal:
            weights = weights - (linear_q @ linear_k.transpose(-1, -2)).to(dtype)
        return weights.masked_fill(~visible, 0.0).to(v.dtype) @ v

    def _quadratic(
        self,
        rotated: tuple[Tensor, ...],
        v: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        state: KVState | None,
    ) -> tuple[Tensor, KVState | None]:
        # The bias is a product of rotated vectors too: as further channels of q and k it is part of
        # the one product, and past keys carry theirs.
        before, after = self.rotary_bias[:, None, None, None].to(v.dtype)
        before, after = self.rotary((before, after), positions)
        q = torch.cat([rotated[0] / self.divisor, before.expand_as(rotated[0])], -1)
        k = torch.cat([rotated[1], after.expand_as(rotated[1])], -1)
        if cu_seqlens is None:
            o, state = self._rows(q, k, v, mask, state)
        else:
            place, rows, longest = _padded_places(cu_seqlens, v.shape[1])
            real = torch.ones_like(place, dtype=torch.bool) if mask is None else mask[0]

            def padded(x: Tensor) -> Tensor:
                rest = x.new_zeros(rows * longest, *x.shape[1:])
                return rest.index_copy(0, place, x).unflatten(0, (rows, longest))

            o, state = self._rows(padded(q[0]), padded(k[0]), padded(v[0]), padded(real), state)
            o = o.flatten(0, 1)[place][None]
        return o, state if self.causal else None

    def _rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: KVState | None
    ) -> tuple[Tensor, KVState]:
        """A v within each row, after the tokens of the past; and the state with the new ones."""
        state = KVState(k, v, torch.ones(v.shape[:2], dtype=torch.bool, device=v.device))
        if mask is not None:
            pads = ~mask[..., None, None]
            state = KVState(k.masked_fill(pads, 0.0), v.masked_fill(pads, 0.0), mask)
        if past is not None:
            state = KVState(*(torch.cat([a.to(b.dtype), b], 1) for a, b in zip(past, state)))
        keys, values, valid = state
        scores = q.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        weights = scores.to(accumulation_dtype(v.dtype)).relu().square()
        if self.causal:
            query = torch.arange(keys.shape[1] - q.shape[1], keys.shape[1], device=q.device)
            key = torch.arange(keys.shape[1], device=q.device)
            weights = weights.masked_fill(key > query[:, None], 0.0)
        if mask is not None or past is not None:
            weights = weights.masked_fill(~valid[:, None, None], 0.0)
        return (weights.to(v.dtype) @ values.transpose(1, 2)).transpose(1, 2), state

    def mixing_flops(self, context: int) -> float:
        key_dim, width = self.config.key_dim, self.hidden_dim
        if not self.linear:
            return 2.0 * context * (2 * key_dim + width)
        # Where causal the chunk's own part of the linear term is computed and taken off.
        products = key_dim * (2 if self.causal else 1) + width
        near = 2.0 * min(context, self.config.chunk_size) * products
        return near + self.core.flops_per_token(self.groups, key_dim, width // self.groups, context)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GauState | KVState:
        config = self.config
        slots = config.chunk_size if self.linear else 0
        block = empty_block(
            rows, slots, 1, 2 * config.key_dim, self.hidden_dim, dtype=dtype, device=device
        )
        if not self.linear:
            return block
        value_dim = self.hidden_dim // self.groups
        sums = zeros(rows, self.groups, config.key_dim, value_dim, dtype=dtype, device=device)
        return GauState(*block, sums)


def _padded_places(cu_seqlens: Tensor, seq: int) -> tuple[Tensor, int, int]:
    """Place of each packed token in padded rows, [seq]; the rows and how long they are.

    The longest sequence is read on the host, which waits for a GPU; a graph of torch.compile cannot
    depend on it, and takes seq.
    """
    bounds = cu_seqlens.to(torch.int64)
    longest = seq if torch.compiler.is_compiling() else max(int(bounds.diff().max()), 1)
    token = torch.arange(seq, device=bounds.device)
    row = torch.searchsorted(bounds[1:], token, right=True)
    return row * longest + token - bounds[row], bounds.shape[0] - 1, longest
