"""Softmax attention with rotary positions and grouped heads: the token mixer of LLaMA."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.rotary import Rotary
from transnormer.nn.softmax_attention import SoftmaxAttentionCore
from transnormer.nn.state import KVState
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase


class SoftmaxConfig(TokenMixerBase):
    """Softmax attention; the defaults are LLaMA's.

    Attributes:
        heads: query heads.
        kv_heads: heads of keys and values, a divisor of heads; None is heads (no grouping).
        head_dim: channels of a head; None is model_dim / heads.
        rope_base: of the rotary positions, whose frequencies run from 1 down to 1/rope_base;
            channel i turns with i + head_dim / 2 (Hugging Face's order). None has no positions.
        bias: of all four projections.
    """

    kind: Literal["softmax"] = "softmax"
    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rope_base: float | None = Field(default=10_000.0, gt=0.0)
    bias: bool = False

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "Softmax":
        return Softmax(self, model_dim, causal=causal)


class Softmax(TokenMixer):
    """One layer's softmax attention, of grouped query heads (Ainslie et al. 2023, arXiv:2305.13245).

    q, k, v = rope(x W_q), rope(x W_k), x W_v;  o_t = sum_s softmax_s(q_t k_s / sqrt(head_dim)) v_s
    over s <= t (all s where not causal);  y = merge(o) W_o (Vaswani et al. 2017, arXiv:1706.03762;
    Touvron et al. 2023, arXiv:2302.13971). The state is a ``KVState``, which grows with each token
    and has the activations' dtype.
    """

    may_drop_state = True

    def __init__(self, config: SoftmaxConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        kv_heads = config.kv_heads or config.heads
        if config.heads % kv_heads:
            raise ValueError(
                f"kv_heads is {kv_heads}; expected a divisor of heads, which is {config.heads}"
            )
        if config.head_dim is None and model_dim % config.heads:
            raise ValueError(
                f"heads is {config.heads}; expected a divisor of {model_dim}; or set head_dim"
            )
        self.config, self.kv_heads = config, kv_heads
        self.core = SoftmaxAttentionCore(causal=causal)
        self.head_dim = config.head_dim or model_dim // config.heads
        width, kv_width = config.heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(model_dim, width, bias=config.bias)
        self.k_proj = nn.Linear(model_dim, kv_width, bias=config.bias)
        self.v_proj = nn.Linear(model_dim, kv_width, bias=config.bias)
        self.rotary = (
            None if config.rope_base is None else Rotary(self.head_dim, base=config.rope_base)
        )
        self.out_proj = nn.Linear(width, model_dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: KVState | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, KVState | None]:
        # The local head count is inferred, so that a slice of the heads runs unchanged.
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary is not None:
            q, k = self.rotary((q, k), positions)
        o, state = self.core(
            q, k, v, state=state, cu_seqlens=cu_seqlens, mask=mask, keep_state=keep_state
        )
        return self.out_proj(o.flatten(2)), state

    def mixing_flops(self, context: int) -> float:
        return 4.0 * context * self.config.heads * self.head_dim

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVState:
        keys, values = (
            torch.zeros(rows, 0, self.kv_heads, self.head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        return KVState(keys, values, torch.zeros(rows, 0, dtype=torch.bool, device=device))
