"""HGRN2: linear attention whose keys are what the forget gates forget."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.activations import activation
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.lower_bounds import LowerBoundRule, LowerBounds, bound_of
from transnormer.nn.norms import NormConfig
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.gates import forget_gate


class Hgrn2Config(TokenMixerBase):
    """HGRN2; the defaults are the released language models'.

    Attributes:
        head_dim: the state of a head is head_dim x head_dim (the papers' expand ratio); it divides
            model_dim, which gives the heads.
        q_activation: of q, the output gate: "silu" (language models, flash-linear-attention) or
            "sigmoid" (the paper's text; the code for images and Long Range Arena).
        v_activation: of v: "none" (language models) or "silu" (images, Long Range Arena).
        lower_bound: how the layers' bounds follow from the shared matrix, see ``LowerBounds``;
            "none" leaves them out (an ablation). All layers of a model take the same.
        norm: of the merged heads.
        bias: of both projections.
    """

    kind: Literal["hgrn2"] = "hgrn2"
    head_dim: int = Field(default=128, ge=1)
    q_activation: Literal["silu", "sigmoid"] = "silu"
    v_activation: Literal["none", "silu"] = "none"
    lower_bound: LowerBoundRule = "cumulative"
    norm: NormConfig = NormConfig()
    bias: bool = False

    def build(self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool) -> "Hgrn2":
        return Hgrn2(self, model_dim, layer_index, causal=causal)

    def build_shared(self, model_dim: int, num_layers: int) -> LowerBounds | None:
        if self.lower_bound == "none":
            return None
        return LowerBounds(num_layers, model_dim, self.lower_bound)


class Hgrn2(TokenMixer):
    """One layer of HGRN2.

    v, q, z = x W_in;  f = bound + (1 - bound) sigmoid(z);  k = 1 - f;
    S_t = Diag(f_t) S_{t-1} + k_t v_t^T per head;  y_t = norm(merge(act(q_t) S_t)) W_out
    (Qin et al. 2024, arXiv:2404.07904; the released code decides where it differs). Gates are
    computed in max(float32, dtype).

    The state is [rows, heads, head_dim, head_dim] in float32 (float64 for a float64 model). Without
    causality the scans of both directions, which share all projections, are summed before the norm
    as in the released code: each includes the token itself, which counts twice.
    """

    def __init__(
        self, config: Hgrn2Config, model_dim: int, layer_index: int, *, causal: bool
    ) -> None:
        super().__init__()
        if model_dim % config.head_dim:
            raise ValueError(
                f"head_dim is {config.head_dim}; expected a divisor of model_dim, which is "
                f"{model_dim}"
            )
        self.config, self.layer_index = config, layer_index
        self.heads = model_dim // config.head_dim
        self.in_proj = nn.Linear(model_dim, 3 * model_dim, bias=config.bias)
        self.core = LinearAttentionCore(causal=causal)
        self.norm = config.norm.build(model_dim)
        self.out_proj = nn.Linear(model_dim, model_dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        bound = bound_of(shared, config.lower_bound, self.layer_index)
        v, q, z = self.in_proj(x).chunk(3, -1)
        log_decay, k = forget_gate(z, bound, dtype=z.dtype)
        q, v = activation(config.q_activation)(q), activation(config.v_activation)(v)
        q, k, v, log_decay = (
            part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v, log_decay)
        )
        o, state = self.core(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, mask=mask)
        if not self.core.causal:
            o = _with_token_again(o, q, k, v)
        return self.out_proj(self.norm(o.flatten(2))), state

    def mixing_flops(self, context: int) -> float:
        head_dim = self.config.head_dim
        return self.core.flops_per_token(self.heads, head_dim, head_dim, context)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        head_dim = self.config.head_dim
        return zeros(rows, self.heads, head_dim, head_dim, dtype=dtype, device=device)


def _with_token_again(o: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o + (q k^T) v of each token, in o's dtype; the core counts it once."""
    wide = accumulation_dtype(o.dtype)
    weight = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True)
    return (o.to(wide) + weight * v.to(wide)).to(o.dtype)
