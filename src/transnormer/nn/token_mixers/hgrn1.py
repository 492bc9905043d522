"""HGRN: a gated recurrence of complex vectors, the predecessor and baseline of HGRN2."""

from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.activations import activation
from transnormer.nn.lower_bounds import LowerBoundRule, LowerBounds, bound_of
from transnormer.nn.norms import NormConfig
from transnormer.nn.precision import KeepPrecision
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.gates import forget_gate
from transnormer.ops.scan import complex_scan


class Hgrn1Config(TokenMixerBase):
    """HGRN; the defaults are the released code's.

    Attributes:
        gate_activation: of the output gate: "silu" (released) or "sigmoid".
        gate_position: multiply after the norm (released) or before it (the paper's formula).
        lower_bound: how the layers' bounds follow from the shared matrix, see ``LowerBounds``;
            "none" leaves them out (an ablation). All layers of a model take the same.
        norm: of the real and imaginary parts together, 2 model_dim channels.
        bias: of all projections.
    """

    kind: Literal["hgrn1"] = "hgrn1"
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    gate_position: Literal["after_norm", "before_norm"] = "after_norm"
    lower_bound: LowerBoundRule = "cumulative"
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    bias: bool = True

    def build(self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool) -> "Hgrn1":
        return Hgrn1(self, model_dim, layer_index, causal=causal)

    def build_shared(self, model_dim: int, num_layers: int) -> LowerBounds | None:
        if self.lower_bound == "none":
            return None
        return LowerBounds(num_layers, model_dim, self.lower_bound)


class Phase(KeepPrecision):
    """A learned angle a channel, theta_i = 10000^(-2 i / width) at the start, float32 or better."""

    def __init__(self, width: int) -> None:
        super().__init__()
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.theta = nn.Parameter(torch.empty(width, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width = self.theta.shape[0]
        index = torch.arange(width, dtype=torch.float64, device=self.theta.device)
        self.theta.copy_(10_000.0 ** (-2.0 * index / width))

    def forward(self) -> Tensor:
        """exp(i theta) as pairs, [width, 2]."""
        return torch.stack([self.theta.cos(), self.theta.sin()], -1)


class Hgrn1(TokenMixer):
    """One layer of HGRN (Qin et al. 2023, arXiv:2311.04823; the released code decides).

    c = silu(x W_c), complex;  f = bound + (1 - bound) sigmoid(x W_f);
    h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) c_t, elementwise;
    y_t = (norm([Re h_t; Im h_t]) * act(x_t W_g)) W_out.

    The state is h, [rows, model_dim, 2] of real and imaginary part, in float32 (float64 for a
    float64 model), as the gates and the recurrence are. Without causality the scans of both
    directions, which share everything, are summed before the norm as in the released code: each
    includes the token itself, which counts twice.
    """

    def __init__(
        self, config: Hgrn1Config, model_dim: int, layer_index: int, *, causal: bool
    ) -> None:
        super().__init__()
        self.config, self.layer_index, self.causal = config, layer_index, causal
        self.width = model_dim
        self.input_proj = nn.Linear(model_dim, 2 * model_dim, bias=config.bias)
        self.forget_proj = nn.Linear(model_dim, model_dim, bias=config.bias)
        self.gate_proj = nn.Linear(model_dim, 2 * model_dim, bias=config.bias)
        self.phase = Phase(model_dim)
        self.norm = config.norm.build(2 * model_dim)
        self.out_proj = nn.Linear(2 * model_dim, model_dim, bias=config.bias)

    def _recurrence(
        self, x: Tensor, mask: Tensor | None, bound: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Factors f exp(i theta) and inputs (1 - f) c, both [batch, seq, width, 2]."""
        log_forget, taken = forget_gate(self.forget_proj(x), bound)
        c = nn.functional.silu(self.input_proj(x)).unflatten(-1, (-1, 2)).to(taken.dtype)
        turn = self.phase().to(taken.dtype)
        factors, inputs = log_forget.exp()[..., None] * turn, taken[..., None] * c
        if mask is not None:
            # A masked token neither forgets nor turns.
            still = torch.stack([torch.ones_like(turn[:, 0]), torch.zeros_like(turn[:, 0])], -1)
            factors = torch.where(mask[..., None, None], factors, still)
            inputs = inputs.masked_fill(~mask[..., None, None], 0.0)
        return factors, inputs

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
        factors, inputs = self._recurrence(x, mask, bound)
        h, after = complex_scan(factors, inputs, initial_state=state, cu_seqlens=cu_seqlens)
        if not self.causal:
            if cu_seqlens is not None:
                # A packed row flipped whole has its sequences in the opposite order.
                cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
            back, _ = complex_scan(factors.flip(1), inputs.flip(1), cu_seqlens=cu_seqlens)
            h, after = h + back.flip(1), None
        h = h.transpose(-1, -2).flatten(2).to(x.dtype)
        gate = activation(config.gate_activation)(self.gate_proj(x))
        if config.gate_position == "before_norm":
            return self.out_proj(self.norm(h * gate)), after
        return self.out_proj(self.norm(h) * gate), after

    def mixing_flops(self, context: int) -> float:
        # A complex multiply-add is 8.
        return 8.0 * self.width * (1 if self.causal else 2)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return zeros(rows, self.width, 2, dtype=dtype, device=device)
