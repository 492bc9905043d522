"""Multi-scale retention: the token mixer of RetNet."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.norms import NormConfig
from transnormer.nn.precision import KeepPrecision
from transnormer.nn.rotary import Rotary
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.decay import RetnetDecayRule, retnet_log_decay


class RetentionConfig(TokenMixerBase):
    """Multi-scale retention; the defaults are torchscale's RetNet.

    Attributes:
        heads: retention heads.
        key_dim: of a head, even; None is model_dim / heads.
        value_width: of v and the gate, over all heads; None is 2 model_dim.
        decay: rule of the heads' decays, see ``ops.decay.retnet_log_decay``.
        norm_eps: of the RMS norm of each head's output, which has no weight.
    """

    kind: Literal["retention"] = "retention"
    heads: int = Field(ge=1)
    key_dim: int | None = Field(default=None, ge=2)
    value_width: int | None = Field(default=None, ge=1)
    decay: RetnetDecayRule = "retnet"
    norm_eps: float = Field(default=1e-6, ge=0.0)

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "Retention":
        return Retention(self, model_dim, causal=causal)


class RetentionLogDecay(KeepPrecision):
    """The log decays of the heads, [heads], kept in float64 and never trained."""

    lowest = torch.float64
    log_decay: Tensor

    def __init__(self, heads: int, rule: RetnetDecayRule) -> None:
        super().__init__()
        self._heads, self._rule = heads, rule
        self.register_buffer("log_decay", self._values(), persistent=False)

    def _values(self) -> Tensor:
        return retnet_log_decay(self._heads, rule=self._rule, dtype=torch.float64)

    def reset_parameters(self) -> None:
        device = self.log_decay.device
        with torch.device("cpu"):
            self.log_decay = self._values().to(device)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The log decays in the accumulation dtype of activations of ``dtype``."""
        return self.log_decay.to(accumulation_dtype(dtype))


class Retention(TokenMixer):
    """Multi-scale retention (MSR).

    q_n, k_n = R(n theta) x W_q, R(n theta) x W_k key_dim^-1/2 with rotations R of neighbouring
    channels;  S_n = gamma_h S_{n-1} + k_n v_n^T;  o_n = q_n S_n;
    y = (swish(x W_g) * merge(rms_norm of each head's o)) W_o
    (Sun et al. 2023, arXiv:2307.08621, section 2; torchscale decides where it differs: frequencies
    down to 1/10000 with the last included, no biases, RMS instead of group norm).

    torchscale also divides the decays of a row by the root of their sum, and the scores by the size
    of theirs. The norm of each head takes such positive factors of a token out again, so the plain
    recurrence computes the same, up to norm_eps where outputs are tiny.

    The state is [rows, heads, key_dim, value_dim] in float32 (float64 for a float64 model). Without
    causality a token takes gamma^|n - m| of every other, itself once.
    """

    steps_in_slots = True

    def __init__(self, config: RetentionConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        heads, value_width = config.heads, config.value_width or 2 * model_dim
        if config.key_dim is None and model_dim % heads:
            raise ValueError(
                f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}; or set "
                "key_dim"
            )
        if value_width % heads:
            raise ValueError(f"value_width is {value_width}; expected a multiple of heads, {heads}")
        self.config = config
        self.key_dim = config.key_dim or model_dim // heads
        self.value_dim = value_width // heads
        self.q_proj = nn.Linear(model_dim, heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(model_dim, heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(model_dim, value_width, bias=False)
        self.gate_proj = nn.Linear(model_dim, value_width, bias=False)
        self.rotary = Rotary(self.key_dim, pairs="neighbours", last_included=True)
        self.decay = RetentionLogDecay(heads, config.decay)
        self.core = LinearAttentionCore(causal=causal)
        self.norm = NormConfig(eps=config.norm_eps).build(self.value_dim)
        self.out_proj = nn.Linear(value_width, model_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform Xavier weights with gain 2^-2.5, the output's with 2^-1, as torchscale's."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2.0**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        # The local head count is inferred, so that a slice of the heads runs unchanged.
        q = self.q_proj(x).unflatten(-1, (-1, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.key_dim)) * self.key_dim**-0.5
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        q, k = self.rotary((q, k), positions)
        log_decay = self.log_decay(q.dtype)
        o, state = self.core(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, mask=mask)
        return self.out_proj(F.silu(self.gate_proj(x)) * self.norm(o).flatten(2)), state

    def log_decay(self, dtype: torch.dtype) -> Tensor:
        return self.decay(dtype)

    def mixing_flops(self, context: int) -> float:
        return self.core.flops_per_token(self.config.heads, self.key_dim, self.value_dim, context)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        shape = (rows, self.config.heads, self.key_dim, self.value_dim)
        return zeros(*shape, dtype=dtype, device=device)
