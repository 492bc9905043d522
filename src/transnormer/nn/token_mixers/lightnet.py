"""LightNet: additive recurrence, whose keys are a softmax over the tokens read so far."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.activations import Activation, activation
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.norms import NormConfig
from transnormer.nn.positions import LrpeInit, MdLrpe
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.gates import cumulative_softmax
from transnormer.ops.gates.cumulative_softmax import sequences_of

# Stands for log 0 where -inf minus -inf would be NaN.
_EMPTY = -1e30


class LightNetState(NamedTuple):
    """What a LightNet layer carries on.

    Attributes:
        memory: [rows, heads, key_dim (twice with LRPE), value_dim], float32 or float64.
        log_mass: log of the sum of exp(k) so far, [rows, heads, key_dim]; -inf before any token.
    """

    memory: Tensor
    log_mass: Tensor


class LightNetConfig(TokenMixerBase):
    """LightNet attention; the defaults are the paper's, where sources differ ours are named.

    Attributes:
        heads: attention heads; value_dim is hidden_dim / heads.
        hidden_dim: width of the values and the gate; None is model_dim.
        key_dim: channels of a head's keys; None is value_dim.
        lrpe: encode q and the normalised k by (MD-)LRPE, doubling key_dim. Without it and without
            another position encoding a bidirectional model does not see order.
        lrpe_axes: axes of the input; more than one needs ``shape`` in the call.
        lrpe_init: of its frequencies, see ``Lrpe``.
        condition_tokens: leading tokens beside the grid of ``shape``, which LRPE leaves alone.
        gate: "low_rank" (through gate_rank) or "none".
        gate_rank: None is value_dim.
        gate_activation: of the gate; the public implementation in flash-linear-attention has silu.
        gate_position: multiply after the norm (the paper) or before it (the authors' later code).
        norm: of the merged heads.
        initial_mass: what the sum of exp(k) starts from: 0 (the paper), or 1 (the authors' later
            code), a token that says nothing.
        bias: of all projections.
    """

    kind: Literal["lightnet"] = "lightnet"
    heads: int = Field(ge=1)
    hidden_dim: int | None = Field(default=None, ge=1)
    key_dim: int | None = Field(default=None, ge=1)
    lrpe: bool = True
    lrpe_axes: int = Field(default=1, ge=1)
    lrpe_init: LrpeInit = "head"
    condition_tokens: int = Field(default=0, ge=0)
    gate: Literal["low_rank", "none"] = "low_rank"
    gate_rank: int | None = Field(default=None, ge=1)
    gate_activation: Activation = "sigmoid"
    gate_position: Literal["after_norm", "before_norm"] = "after_norm"
    norm: NormConfig = NormConfig(kind="rms")
    initial_mass: float = Field(default=0.0, ge=0.0)
    bias: bool = False

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "LightNet":
        return LightNet(self, model_dim, causal=causal)


class LightNet(TokenMixer):
    """One layer of LightNet (Qin et al. 2024, arXiv:2405.21022, section 3).

    Per key channel, with z_t = log sum_{s <= t} exp(k_s):
        m_t = exp(z_{t-1} - z_t) m_{t-1} + exp(k_t - z_t) v_t^T;  o_t = silu(q_t) m_t,
    a softmax over the tokens so far. Without ``causal`` the softmax is over all tokens and
    O = silu(Q) (softmax(K)^T V) is one pass whatever the axes. LRPE encodes q and the normalised k.
    y = (norm(merge(o)) * act(x W_down W_up)) W_o. z, decays and keys are computed in float32
    (float64 for a float64 model); the state is a ``LightNetState``.
    """

    def __init__(self, config: LightNetConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim or model_dim
        if hidden_dim % config.heads:
            raise ValueError(f"heads is {config.heads}; expected a divisor of {hidden_dim}")
        self.config, self.causal = config, causal
        self.value_dim = hidden_dim // config.heads
        self.key_dim = config.key_dim or self.value_dim
        width = config.heads * self.key_dim
        self.q_proj = nn.Linear(model_dim, width, bias=config.bias)
        self.k_proj = nn.Linear(model_dim, width, bias=config.bias)
        self.v_proj = nn.Linear(model_dim, hidden_dim, bias=config.bias)
        if config.gate == "low_rank":
            rank = config.gate_rank or self.value_dim
            self.gate_down_proj = nn.Linear(model_dim, rank, bias=config.bias)
            self.gate_up_proj = nn.Linear(rank, hidden_dim, bias=config.bias)
        self.lrpe = None
        if config.lrpe:
            self.lrpe = MdLrpe(
                config.heads,
                self.key_dim,
                axes=config.lrpe_axes,
                condition_tokens=config.condition_tokens,
                init=config.lrpe_init,
            )
        self.core = LinearAttentionCore(causal=causal)
        self.norm = config.norm.build(hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, model_dim, bias=config.bias)

    def _encoded(
        self, x: tuple[Tensor, ...], positions: Tensor, shape: tuple[int, ...] | None
    ) -> tuple[Tensor, ...]:
        return x if self.lrpe is None else self.lrpe(x, positions, shape)

    def _gated(self, o: Tensor, x: Tensor) -> Tensor:
        if self.config.gate == "none":
            return self.norm(o)
        gate = self.gate_up_proj(self.gate_down_proj(x))
        gate = activation(self.config.gate_activation)(gate)
        if self.config.gate_position == "before_norm":
            return self.norm(o * gate)
        return self.norm(o) * gate

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: LightNetState | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, LightNetState | None]:
        """As ``TokenMixer.forward``.

        Raises:
            ValueError: a shape of several axes with a state or packed sequences, or one that does
                not fit the input.
        """
        if shape is not None and len(shape) > 1 and (state is not None or cu_seqlens is not None):
            raise ValueError(
                f"shape is {shape}; expected None or one extent with a state or cu_seqlens: a grid "
                "is given whole"
            )
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        dims = (self.key_dim, self.key_dim, self.value_dim)
        q, k, v = (y.unflatten(-1, (-1, dim)) for y, dim in zip(projected, dims, strict=True))
        q = F.silu(q)
        if not self.causal:
            k = _softmax(k, mask, cu_seqlens, self.config.initial_mass)
            q, k = self._encoded((q, k), positions, shape)
            o = self._whole(q, k.to(q.dtype), v, cu_seqlens)
            return self.out_proj(self._gated(o.flatten(2), x)), None
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        start = self._start(rows, k) if state is None else state.log_mass
        # Masked tokens have key 0 and log decay 0: the core need not know them.
        log_decay, k, log_mass = cumulative_softmax(
            k, start, mask=mask, cu_seqlens=cu_seqlens, copies=1 if self.lrpe is None else 2
        )
        q, k = self._encoded((q, k), positions, shape)
        memory = None if state is None else state.memory
        o, memory = self.core(q, k, v, log_decay, state=memory, cu_seqlens=cu_seqlens, mask=None)
        y = self.out_proj(self._gated(o.flatten(2), x))
        return y, LightNetState(memory, log_mass)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Q (K^T V) over each whole sequence."""
        if cu_seqlens is not None:
            return self.core(q, k, v, None, state=None, cu_seqlens=cu_seqlens, mask=None)[0]
        memory = torch.einsum("bshk,bshv->bhkv", k, v)
        return torch.einsum("bshk,bhkv->bshv", q, memory)

    def _start(self, rows: int, like: Tensor) -> Tensor:
        dtype = accumulation_dtype(like.dtype)
        log_mass = _log(self.config.initial_mass)
        return like.new_full((rows, *like.shape[2:]), log_mass, dtype=dtype)

    def mixing_flops(self, context: int) -> float:
        heads, key_dim = self.config.heads, self.key_dim * (1 if self.lrpe is None else 2)
        if not self.causal:
            # One product with K^T V of the whole sequence, in any number of axes.
            return 4.0 * heads * key_dim * self.value_dim
        return self.core.flops_per_token(heads, key_dim, self.value_dim, context)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LightNetState:
        heads = self.config.heads
        width = self.key_dim * (1 if self.lrpe is None else 2)
        memory = zeros(rows, heads, width, self.value_dim, dtype=dtype, device=device)
        log_mass = zeros(rows, heads, self.key_dim, dtype=dtype, device=device)
        return LightNetState(memory, log_mass.fill_(_log(self.config.initial_mass)))


def _log(mass: float) -> float:
    return math.log(mass) if mass else -math.inf


def _softmax(
    logits: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, initial_mass: float
) -> Tensor:
    """exp(k_t) / (initial_mass + sum_s exp(k_s)) over each sequence; 0 at masked tokens.

    In float32, float64 for float64 logits.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    if mask is not None:
        logits = logits.masked_fill(~mask[..., None, None], -math.inf)
    if logits.shape[1] == 0:
        return logits
    least = max(_log(initial_mass), _EMPTY)
    if cu_seqlens is None:
        peak = logits.detach().amax(1, keepdim=True).clamp(min=least)
        weights = (logits - peak).exp()
        total = weights.sum(1, keepdim=True)
    else:
        bounds, sequence = sequences_of(cu_seqlens, logits.shape[1])
        rows = logits.new_full((bounds.shape[0] - 1, *logits.shape[2:]), least)
        index = sequence[:, None, None].expand(logits.shape[1:])
        peak = rows.scatter_reduce(0, index, logits[0].detach(), "amax")[sequence][None]
        weights = (logits - peak).exp()
        total = torch.zeros_like(rows).index_add(0, sequence, weights[0])[sequence][None]
    if initial_mass:
        total = total + initial_mass * (-peak).exp()
    # The peak alone adds 1. A sequence of pads alone has mass 0 and weights 0.
    return weights / total.clamp(min=1.0)
