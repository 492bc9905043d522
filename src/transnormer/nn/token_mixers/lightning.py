"""Gated linear attention with constant decay: the token mixer of TransNormerLLM and its variants."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.activations import Activation, activation
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.norms import Norm, NormConfig
from transnormer.nn.positions import Lrpe, LrpeInit, MdLrpe
from transnormer.nn.precision import KeepPrecision
from transnormer.nn.rotary import Rotary
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.decay import DecayRule, tnl_log_decay


class LightningConfig(TokenMixerBase):
    """Lightning attention; the defaults are the released TransNormerLLM's layers after the first.

    NormAttention of TransNormer T1 and T2, norm(phi(Q) (phi(K)^T V)) without decay or gate, is this
    mixer with other switches: ``zoo.transnormer`` has them.

    Attributes:
        heads: attention heads; head_dim is hidden_dim / heads.
        hidden_dim: width of q, k, v and the gate; None is model_dim.
        lrpe: rotate q and k by LRPE after their activation (the released models: first layer only).
        lrpe_form: "doubled" is [x cos; x sin], at twice the key_dim (TransNormerLLM); "rotary"
            turns pairs of channels after a fixed reflection, theta shared by the heads, at the same
            key_dim (TransNormer T1 and T2).
        lrpe_init: of the doubled form: frequencies over all heads ("global", released) or each
            head's own ("head", or "half" with the lower half of them 0), see ``Lrpe``.
        lrpe_axes: axes of the input; more than one turns by the coordinates of the grid, ``shape`` in
            the call (see ``Rotary`` and ``MdLrpe``), in bidirectional models. One reads a sequence,
            whatever ``shape`` is. The decay is along the sequence in both cases.
        decay: rule of the heads' decays, see ``ops.decay``; "none" is plain linear attention.
        decay_temperature: scale the decay by depth (the paper's 1 - l/L).
        qk_activation, v_activation: of q and k, and of v.
        gate: "full" (model_dim x hidden_dim), "low_rank" (through gate_rank) or "none".
        gate_rank: inner width of a low-rank gate; None is head_dim.
        gate_activation: of the gate.
        gate_position: multiply after the norm (released) or before it.
        norm: of the merged heads.
        bias: of all projections.
        implementation: of the op; "lightning1" trains with the first paper's quadratic tiles.
    """

    kind: Literal["lightning"] = "lightning"
    heads: int = Field(ge=1)
    hidden_dim: int | None = Field(default=None, ge=1)
    lrpe: bool = False
    lrpe_form: Literal["doubled", "rotary"] = "doubled"
    lrpe_init: LrpeInit = "global"
    lrpe_axes: int = Field(default=1, ge=1)
    decay: DecayRule = "tnl"
    decay_temperature: bool = True
    qk_activation: Activation = "silu"
    v_activation: Activation = "none"
    gate: Literal["full", "low_rank", "none"] = "full"
    gate_rank: int | None = Field(default=None, ge=1)
    gate_activation: Activation = "none"
    gate_position: Literal["after_norm", "before_norm"] = "after_norm"
    norm: NormConfig = NormConfig()
    bias: bool = False
    implementation: Literal["auto", "chunked", "lightning1", "reference", "triton"] = "auto"

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "Lightning":
        if self.lrpe_axes > 1 and causal:
            raise NotImplementedError(
                f"lrpe_axes is {self.lrpe_axes}; expected 1 in a causal model, since a grid has no "
                "one order; use causal=False"
            )
        if self.lrpe_axes > 1 and not self.lrpe:
            raise ValueError(f"lrpe_axes is {self.lrpe_axes}; expected 1 where lrpe is False")
        return Lightning(self, model_dim, layer_index, num_layers, causal=causal)


class ConstantLogDecay(KeepPrecision):
    """The log decays of one layer's heads, [heads], kept in float64 and never trained."""

    lowest = torch.float64
    log_decay: Tensor

    def __init__(self, config: LightningConfig, layer_index: int, num_layers: int) -> None:
        super().__init__()
        self._config, self._layer_index, self._num_layers = config, layer_index, num_layers
        self.register_buffer("log_decay", self._values(), persistent=False)

    def _values(self) -> Tensor:
        config = self._config
        return tnl_log_decay(
            config.heads,
            self._layer_index,
            self._num_layers,
            rule=config.decay,
            temperature=config.decay_temperature,
            dtype=torch.float64,
        )

    def reset_parameters(self) -> None:
        device = self.log_decay.device
        with torch.device("cpu"):
            self.log_decay = self._values().to(device)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The log decays in the accumulation dtype of activations of ``dtype``."""
        return self.log_decay.to(accumulation_dtype(dtype))


class Lightning(TokenMixer):
    """One layer's gated linear attention (GLA).

    q, k, v, u = x W_qkvu;  q, k = lrpe(silu(q)), lrpe(silu(k));  S_t = exp(g) S_{t-1} + k_t v_t^T;
    y = (norm(merge(q_t S_t)) * u) W_o (Qin et al. 2023, arXiv:2307.14995, section 3.1; the released
    code decides where it differs). The state is [batch, heads, key_dim, value_dim] in float32
    (float64 for a float64 model); key_dim is doubled by LRPE in its doubled form.
    """

    may_drop_state = True
    steps_in_slots = True

    def __init__(
        self,
        config: LightningConfig,
        model_dim: int,
        layer_index: int,
        num_layers: int,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim or model_dim
        if hidden_dim % config.heads:
            raise ValueError(f"heads is {config.heads}; expected a divisor of {hidden_dim}")
        self.config = config
        self.head_dim = hidden_dim // config.heads
        self.value_dim = self.head_dim
        doubled = config.lrpe and config.lrpe_form == "doubled"
        self.key_dim = self.head_dim * (2 if doubled else 1)
        parts = 4 if config.gate == "full" else 3
        self.qkvu_proj = nn.Linear(model_dim, parts * hidden_dim, bias=config.bias)
        if config.gate == "low_rank":
            rank = config.gate_rank or self.head_dim
            self.gate_down_proj = nn.Linear(model_dim, rank, bias=config.bias)
            self.gate_up_proj = nn.Linear(rank, hidden_dim, bias=config.bias)
        self.lrpe, axes = None, config.lrpe_axes
        if doubled and axes == 1:
            self.lrpe = Lrpe(config.heads, self.head_dim, init=config.lrpe_init)
        elif doubled:
            self.lrpe = MdLrpe(config.heads, self.head_dim, axes=axes, init=config.lrpe_init)
        elif config.lrpe:
            self.lrpe = Rotary(self.head_dim, learned=True, reflect=True, axes=axes)
        self.decay = ConstantLogDecay(config, layer_index, num_layers)
        self.core = LinearAttentionCore(causal=causal, implementation=config.implementation)
        self.norm = config.norm.build(hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, model_dim, bias=config.bias)
        self._is_released = (
            causal
            and self.lrpe is None
            and config.norm == NormConfig(eps=config.norm.eps)
            and config.implementation in ("auto", "triton")
            and (config.qk_activation, config.v_activation) == ("silu", "none")
            and (config.gate, config.gate_activation) == ("full", "none")
            and config.gate_position == "after_norm"
        )

    def _may_be_joint(self, keep_state: bool, state: Any, mask: Tensor | None) -> bool:
        """Whether one op could do all between the projections: the released layer, trained whole."""
        if keep_state or not self._is_released or state is not None or mask is not None:
            return False
        # Whoever shares heads among ranks puts a part of its own there.
        return type(self.norm) is Norm

    def _gate(self, x: Tensor, fused: Tensor | None) -> Tensor | None:
        if self.config.gate == "none":
            return None
        gate = fused if fused is not None else self.gate_up_proj(self.gate_down_proj(x))
        return activation(self.config.gate_activation)(gate)

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
        keep_state: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``TokenMixer.forward``; without keep_state the state may be None.

        Raises:
            ValueError: with several lrpe_axes, no shape or one that does not fit the input.
            NotImplementedError: with several lrpe_axes, packed sequences.
        """
        config = self.config
        if config.lrpe_axes > 1 and cu_seqlens is not None:
            raise NotImplementedError("cu_seqlens is given; expected None with several lrpe_axes")
        projected = self.qkvu_proj(x)
        if self._may_be_joint(keep_state, state, mask):
            y = self.core.joint(
                projected,
                self.log_decay(projected.dtype),
                head_dim=self.head_dim,
                eps=config.norm.eps,
                cu_seqlens=cu_seqlens,
                implementation="triton" if config.implementation == "triton" else "auto",
            )
            if y is not None:
                return self.out_proj(y), None
        # The local head count is inferred, so that a slice of the heads runs unchanged.
        parts = projected.chunk(4 if config.gate == "full" else 3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts[:3])
        act = activation(config.qk_activation)
        q, k, v = act(q), act(k), activation(config.v_activation)(v)
        if self.lrpe is not None:
            where = (positions,) if config.lrpe_axes == 1 else (positions, shape)
            q, k = self.lrpe((q, k), *where)
        log_decay = self.log_decay(q.dtype)
        o, state = self.core(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, mask=mask)
        o, gate = o.flatten(2), self._gate(x, parts[3] if len(parts) == 4 else None)
        if gate is not None and config.gate_position == "before_norm":
            o = self.norm(o * gate)
        else:
            o = self.norm(o) if gate is None else self.norm(o) * gate
        return self.out_proj(o), state

    def log_decay(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.config.decay == "none" else self.decay(dtype)

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
