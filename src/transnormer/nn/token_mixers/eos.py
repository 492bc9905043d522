"""The grid of expand-oscillate-shrink models: which of the three must depend on the data."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.activations import activation
from transnormer.nn.norms import NormConfig
from transnormer.nn.precision import KeepPrecision
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops import eos
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.decay import alibi_slopes
from transnormer.ops.eos.rows import additive_gates

Oscillation = Literal[
    "additive",
    "constant",
    "constant_key",
    "constant_key_data_key",
    "constant_key_data_value",
    "constant_value",
    "constant_value_data_key",
    "constant_value_data_value",
    "data",
    "data_key",
    "data_value",
    "ones",
    "phase",
    "slopes",
    "ssm",
]
EosActivation = Literal["none", "relu", "sigmoid", "1+elu", "silu", "elu", "relu2", "square"]
_Source = Literal["constant", "data"]

# oscillation -> dims of its constant factor, and of the one that depends on the data
_FACTORS: dict[str, tuple[str, str]] = {
    "constant": ("key value", ""),
    "constant_key": ("key", ""),
    "constant_value": ("value", ""),
    "data": ("", "key value"),
    "data_key": ("", "key"),
    "data_value": ("", "value"),
    "constant_key_data_key": ("key", "key"),
    "constant_key_data_value": ("key", "value"),
    "constant_value_data_key": ("value", "key"),
    "constant_value_data_value": ("value", "value"),
}


def _activation(name: EosActivation) -> Callable[[Tensor], Tensor]:
    if name == "relu2":
        return lambda x: F.relu(x).square()
    return torch.square if name == "square" else activation(name)


class EosConfig(TokenMixerBase):
    """One arm of the grid of Qin et al. 2024 (LCSM), arXiv:2405.17383.

    Attributes:
        heads: memories of key_dim x (model_dim / heads) each.
        key_dim: rows of a memory.
        expand, shrink: e and s of each token by a projection ("data"), or one learned
            key_dim x value_dim matrix a head ("constant"), which weighs entries of the memory.
        oscillation: o. "constant", "data" and their parts "_key", "_value": decays
            sigmoid(.)^(1/temperature), learned or projected, over those dims of the memory (both
            for the bare word; "data" is an outer product), two words are a product. "slopes":
            fixed, exp(-ALiBi slope) a head. "ones": nothing is forgotten. "phase": exp(i theta_j),
            theta_j = 10000^(-2 j / key_dim). "additive": softmax over the past, which needs
            expand "data" and no activation on it. "ssm": exp(-delta_t A) with a step delta of each
            value channel, i times delta (the parameterisation of Mamba).
        temperature: tau; at 16 a decay starts near 0.96.
        activation: of e and s where they depend on the data.
        delta_rank: inner width of the step's projection ("ssm").
        norm: of the merged heads.
        bias: of all projections.
    """

    kind: Literal["eos"] = "eos"
    heads: int = Field(default=1, ge=1)
    key_dim: int = Field(default=64, ge=1)
    expand: _Source = "data"
    shrink: _Source = "data"
    oscillation: Oscillation = "data_key"
    temperature: float = Field(default=16.0, gt=0.0)
    activation: EosActivation = "none"
    delta_rank: int = Field(default=16, ge=1)
    norm: NormConfig = NormConfig(kind="layer")
    bias: bool = False

    def build(self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool) -> "Eos":
        if not causal:
            raise NotImplementedError("eos is a recurrence over the past; expected causal=True")
        return Eos(self, model_dim)


class EosState(NamedTuple):
    """State of the "additive" oscillation; the others' is the memory alone.

    Attributes:
        memory: [rows, heads, key_dim, value_dim], float32 (float64 for a float64 model).
        log_mass: log of the sum of exp(e) so far, [rows, heads, key_dim]; -inf before any token.
    """

    memory: Tensor
    log_mass: Tensor


class ConstantOscillation(KeepPrecision):
    """What of o does not depend on the data: decays, slopes, A and theta, float32 or better."""

    def __init__(self, config: EosConfig, value_dim: int) -> None:
        super().__init__()
        self.config, self.lowest = config, torch.float32
        sizes = {"key": config.key_dim, "value": value_dim}
        dtype = accumulation_dtype(torch.get_default_dtype())
        constant, _ = _FACTORS.get(config.oscillation, ("", ""))
        if config.oscillation == "ssm":
            constant = "key value"
        if constant:
            shape = [sizes[dim] if dim in constant.split() else 1 for dim in sizes]
            self.logit = nn.Parameter(torch.empty(config.heads, *shape, dtype=dtype))
        if config.oscillation in ("phase", "slopes"):
            # Fixed angles multiply positions: they stay float64.
            self.lowest = torch.float64
            self.register_buffer("fixed", self._values(), persistent=False)
        self.reset_parameters()

    def _values(self) -> Tensor:
        """Slopes or angles, [heads or 1, key_dim or 1, 1]."""
        config = self.config
        if config.oscillation == "slopes":
            values = -torch.tensor(alibi_slopes(config.heads), dtype=torch.float64)
            return values.view(-1, 1, 1)
        index = torch.arange(config.key_dim, dtype=torch.float64)
        return (10_000.0 ** (-2.0 * index / config.key_dim)).view(1, -1, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if hasattr(self, "fixed"):
            self.fixed = self._values().to(self.fixed.device)
        if not hasattr(self, "logit"):
            return
        if self.config.oscillation == "ssm":
            rates = torch.arange(1, self.config.key_dim + 1, device=self.logit.device)
            self.logit.copy_(rates.log()[:, None].expand_as(self.logit))
        else:
            nn.init.normal_(self.logit)

    def forward(self) -> Tensor | None:
        """Log decay or rates, rank 5 with batch and seq 1, complex for "phase"; None for none."""
        kind = self.config.oscillation
        if kind == "slopes":
            return self.fixed[None, None]
        if kind == "phase":
            return torch.complex(torch.zeros_like(self.fixed), self.fixed)[None, None]
        if not hasattr(self, "logit"):
            return None
        if kind == "ssm":
            return self.logit.exp()[None, None]
        return F.logsigmoid(self.logit)[None, None] / self.config.temperature


class _Call(NamedTuple):
    """Arguments of eos, seq dim 1 where constant; e is the raw keys of "additive"."""

    i: Tensor
    e: Tensor
    s: Tensor
    log_o: Tensor | None

    def part(self, start: int, stop: int) -> "_Call":
        """The arguments of some of the tokens."""
        i, e, s = (x[:, start:stop] if x.shape[1] > 1 else x for x in self[:3])
        log_o = self.log_o
        if log_o is not None and log_o.shape[1] > 1:
            log_o = log_o[:, start:stop]
        return _Call(i, e, s, log_o)


class Eos(TokenMixer):
    """m_t = o_t * m_{t-1} + e_t i_t^T;  y = norm(merge(m_t^T s_t)) W_o, by ``ops.eos``.

    A constant e or s is a matrix that weighs each entry of the memory; each value channel is then a
    head of its own inside. Decays and steps are computed in float32 (float64 for a float64 model).
    The state is the memory, [rows, heads, key_dim, value_dim] in that dtype, for "phase" with the
    real and imaginary part in one more dim, for "additive" an ``EosState``.
    """

    def __init__(self, config: EosConfig, model_dim: int) -> None:
        super().__init__()
        if model_dim % config.heads:
            raise ValueError(f"heads is {config.heads}; expected a divisor of {model_dim}")
        kind = config.oscillation
        if kind == "additive" and (config.expand == "constant" or config.activation != "none"):
            raise ValueError(
                f"expand is {config.expand!r} and activation {config.activation!r}; expected 'data' "
                "and 'none' with oscillation 'additive', whose e is a softmax"
            )
        self.config = config
        self.key_dim, self.value_dim = config.key_dim, model_dim // config.heads
        keys, bias = config.heads * config.key_dim, config.bias
        self.i_proj = nn.Linear(model_dim, model_dim, bias=bias)
        for name, source in (("e", config.expand), ("s", config.shrink)):
            if source == "data":
                self.add_module(f"{name}_proj", nn.Linear(model_dim, keys, bias=bias))
            else:
                shape = (config.heads, config.key_dim, self.value_dim)
                self.register_parameter(f"{name}_matrix", nn.Parameter(torch.empty(shape)))
        _, data = _FACTORS.get(kind, ("", ""))
        if "key" in data:
            self.o_key_proj = nn.Linear(model_dim, keys, bias=bias)
        if "value" in data:
            self.o_value_proj = nn.Linear(model_dim, model_dim, bias=bias)
        if kind == "ssm":
            self.delta_down_proj = nn.Linear(model_dim, config.delta_rank, bias=False)
            self.delta_up_proj = nn.Linear(config.delta_rank, model_dim)
        self.oscillation = ConstantOscillation(config, self.value_dim)
        self.norm = config.norm.build(model_dim)
        self.out_proj = nn.Linear(model_dim, model_dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name in ("e_matrix", "s_matrix"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=0.1)
        if self.config.oscillation == "ssm":
            # Steps of 0.001 to 0.1, evenly in their logarithm, through the inverse of softplus.
            bias = self.delta_up_proj.bias
            steps = torch.exp(torch.empty_like(bias).uniform_(-6.9, -2.3))
            bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    @property
    def _by_channel(self) -> bool:
        """Whether each value channel is a head inside."""
        return "constant" in (self.config.expand, self.config.shrink)

    def _heads(self, x: Tensor, dim: int) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    def _vector(self, name: str, x: Tensor) -> Tensor:
        """e or s: [batch, seq, heads, key_dim], or [1, 1, heads, key_dim, value_dim] if constant."""
        if hasattr(self, f"{name}_matrix"):
            return getattr(self, f"{name}_matrix")[None, None]
        y = self._heads(getattr(self, f"{name}_proj")(x), self.key_dim)
        return _activation(self.config.activation)(y)

    def _log_o(self, x: Tensor, i: Tensor) -> tuple[Tensor | None, Tensor]:
        """log_o of rank 5 (None: never forgets, or additive), and i."""
        config, constant = self.config, self.oscillation()
        dtype = accumulation_dtype(i.dtype)
        if config.oscillation == "ssm":
            delta = self.delta_up_proj(self.delta_down_proj(x)).to(dtype)
            delta = self._heads(F.softplus(delta), self.value_dim)
            assert constant is not None
            return -delta[..., None, :] * constant.to(dtype), (delta * i).to(i.dtype)
        if constant is not None and not constant.is_complex():
            constant = constant.to(dtype)
        _, data = _FACTORS.get(config.oscillation, ("", ""))
        parts = [] if constant is None else [constant]
        if "key" in data:
            parts.append(self._log_gate(self.o_key_proj(x), self.key_dim, dtype)[..., None])
        if "value" in data:
            gate = self._log_gate(self.o_value_proj(x), self.value_dim, dtype)
            parts.append(gate[..., None, :])
        return (sum(parts[1:], start=parts[0]) if parts else None), i

    def _log_gate(self, logit: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return self._heads(F.logsigmoid(logit.to(dtype)), dim) / self.config.temperature

    def _call(self, x: Tensor, mask: Tensor | None) -> _Call:
        """All that eos needs of a batch of tokens; a masked one adds nothing and decays nothing."""
        i = self._heads(self.i_proj(x), self.value_dim)
        e, s = self._vector("e", x).to(i.dtype), self._vector("s", x).to(i.dtype)
        log_o, i = self._log_o(x, i)
        if mask is not None:
            there = mask[..., None, None]
            i = i.masked_fill(~there, 0.0)
            if self.config.oscillation == "additive":
                e = e.masked_fill(~there, -torch.inf)
            if log_o is not None:
                log_o = torch.where(there[..., None], log_o, 0.0)
        return _Call(i, e, s, log_o)

    def _split(self, x: Tensor) -> Tensor:
        """A constant matrix, or a vector a token, for heads that are value channels."""
        if x.dim() == 5:
            return x.transpose(-1, -2).flatten(2, 3)
        # One head broadcasts to all channels without a copy.
        return x if x.shape[2] == 1 else x.repeat_interleave(self.value_dim, 2)

    def _mix(self, call: _Call, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """y, [batch, seq, heads, value_dim], and the memory [batch, heads, key_dim, value_dim]."""
        i, e, s, log_o = call
        o = 1.0 if log_o is None else None
        if not self._by_channel:
            return eos(i, e, s, o, log_o=log_o, state=memory)
        if log_o is not None and log_o.shape[2::2] != (1, 1):
            whole = log_o.expand(*log_o.shape[:2], i.shape[2], -1, self.value_dim)
            log_o = whole.transpose(-1, -2).flatten(2, 3)[..., None]
        if memory is not None:
            memory = memory.transpose(-1, -2).flatten(1, 2)[..., None]
        i, e, s = i.flatten(2)[..., None], self._split(e), self._split(s)
        y, memory = eos(i, e, s, o, log_o=log_o, state=memory)
        memory = memory[..., 0].unflatten(1, (-1, self.value_dim)).transpose(-1, -2)
        return y[..., 0].unflatten(-1, (-1, self.value_dim)), memory

    def _sequence(self, call: _Call, state: Any) -> tuple[Tensor, Any]:
        """Mix sequences that are not packed; the state as the layer hands it out."""
        if self.config.oscillation == "phase":
            memory = None if state is None else torch.view_as_complex(state.contiguous())
            y, memory = self._mix(call, memory)
            return y, torch.view_as_real(memory)
        if self.config.oscillation != "additive":
            return self._mix(call, state)
        expand, log_o, mass = additive_gates(call.e, None if state is None else state.log_mass)
        call = call._replace(e=expand.to(call.i.dtype), log_o=log_o[..., None])
        y, memory = self._mix(call, None if state is None else state.memory)
        return y, EosState(memory, mass)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, Any]:
        call = self._call(x, mask)
        if cu_seqlens is None:
            y, state = self._sequence(call, state)
        else:
            y, state = self._packed(call, cu_seqlens, state)
        return self.out_proj(self.norm(y.flatten(2).to(x.dtype))), state

    def _packed(self, call: _Call, cu_seqlens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One sequence after the other; an empty one passes its state on."""
        bounds = cu_seqlens.tolist()
        if state is None:
            i = call.i
            state = self.empty_state(len(bounds) - 1, dtype=i.dtype, device=i.device)
        single = isinstance(state, Tensor)
        outputs, states = [], []
        for row, (start, stop) in enumerate(pairwise(bounds)):
            here = slice(row, row + 1)
            part = state[here] if single else EosState(*(x[here] for x in state))
            if stop > start:
                y, part = self._sequence(call.part(start, stop), part)
                outputs.append(y)
            states.append(part)
        y = torch.cat(outputs, 1) if outputs else call.i
        if single:
            return y, torch.cat(states)
        return y, EosState(*(torch.cat(x) for x in zip(*states)))

    def mixing_flops(self, context: int) -> float:
        config, entries = self.config, self.key_dim * self.value_dim * self.config.heads
        factors = _FACTORS.get(config.oscillation, ("", ""))
        by_entry = config.oscillation == "ssm" or "value" in "".join(factors)
        if by_entry or self._by_channel:
            # Decay, expand and shrink of each entry of the memory.
            return 5.0 * entries
        keys = self.key_dim * (2 if config.oscillation == "phase" else 1)
        block = min(keys, self.value_dim, context)
        dims = keys + self.value_dim
        return config.heads * (2.0 * block * dims + 4.0 * keys * self.value_dim)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Any:
        heads, kind = self.config.heads, self.config.oscillation
        shape = (rows, heads, self.key_dim, self.value_dim, *([2] if kind == "phase" else []))
        memory = zeros(*shape, dtype=dtype, device=device)
        if kind != "additive":
            return memory
        log_mass = zeros(rows, heads, self.key_dim, dtype=dtype, device=device)
        return EosState(memory, log_mass.fill_(-torch.inf))
