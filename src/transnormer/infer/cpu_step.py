"""A decoding step of a TransNormerLLM on a CPU: weights at the memory's speed, few calls between."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.models.decoder import Block, Decoder
from transnormer.nn.activations import activation
from transnormer.nn.channel_mixers.glu import Glu
from transnormer.nn.norms import Norm, NormConfig
from transnormer.nn.state import LayerState, SlotState
from transnormer.nn.token_mixers.lightning import Lightning
from transnormer.ops import RingState, few_rows

Function = Callable[[Tensor], Tensor]
# The most rows whose products have the matrix on the left; more are left to the model's modules.
ROWS: int = 16


class _Layer(NamedTuple):
    """What a step needs of a block, looked up once."""

    norm: Function
    qkvu: Function
    mixer: Lightning
    gate_norm: Function
    out: Function
    glu_norm: Function
    gate: Function
    up: Function
    activation: Function
    down: Function
    log_decay: Tensor | None
    decay: Tensor | None


class CpuStep:
    """The decoding step of ``Decoder`` for a CPU, with what a step of few rows costs left out.

    Such a step reads every weight once, and makes some thirty calls a layer whose tensors are tiny.
    Here products have the matrix on the left (``ops.few_rows``), which reads it up to twice as fast;
    int8 weights are read as they are; norms are single calls, checks are made once, and a state is
    advanced where it lies. It computes what the model does, rounding in the same places.

    Args:
        model: a TransNormerLLM in eval mode on a CPU; not to be changed while this lives.

    Raises:
        NotImplementedError: a mixer that is not TransNormerLLM's, or absolute positions.
    """

    def __init__(self, model: Decoder) -> None:
        if model.config.max_positions:
            raise NotImplementedError(
                f"max_positions is {model.config.max_positions}; expected 0 for fused steps; use "
                "fused=False"
            )
        self._table = model.embedding.weight.detach()
        self._head = partial(_product, weight=model.head_weight.detach(), bias=None)
        self._scale = math.sqrt(model.config.model_dim) if model.config.embedding_scale else 1.0
        self._final_norm = _norm(model.final_norm)
        self._layers = [
            _layer(f"blocks[{i}]", block, self._table.dtype) for i, block in enumerate(model.blocks)
        ]

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, slots: Tensor, positions: Tensor, states: list[LayerState]
    ) -> Tensor:
        """Advance slots by some tokens each; logits [rows, tokens, vocab_size].

        Args:
            ids: int32 or int64 [rows, tokens].
            slots: int32 [rows]; a row with -1 changes no state, and its logits mean nothing.
            positions: int64 [slots], where each slot stands; moved on by the tokens.
            states: a pool or ring of each layer, advanced in place.
        """
        rows, tokens = ids.shape
        used = slots.tolist()
        where = positions.index_select(0, slots.clamp(min=0).to(torch.int64)).unsqueeze(1)
        where = where + torch.arange(tokens)
        x = F.embedding(ids.reshape(-1), self._table) * self._scale
        for layer, state in zip(self._layers, states, strict=True):
            qkvu = layer.qkvu(layer.norm(x))
            o, gate = _mix(layer, qkvu.view(rows, tokens, -1), where, slots, used, state)
            x = x + layer.out(layer.gate_norm(o.reshape(rows * tokens, -1)) * gate)
            h = layer.glu_norm(x)
            x = x + layer.down(layer.activation(layer.gate(h)) * layer.up(h))
        real = torch.tensor([slot for slot in used if slot >= 0], dtype=torch.int64)
        positions.index_add_(0, real, torch.full_like(real, tokens))
        return self._head(self._final_norm(x)).view(rows, tokens, -1)


def _mix(
    layer: _Layer,
    qkvu: Tensor,
    where: Tensor,
    slots: Tensor,
    used: list[int],
    state: LayerState,
) -> tuple[Tensor, Tensor]:
    """The heads' outputs, [rows, tokens, heads, head_dim], and the gate [rows * tokens, hidden]."""
    mixer = layer.mixer
    config, hidden = mixer.config, mixer.head_dim * mixer.config.heads
    rows, tokens = qkvu.shape[:2]
    q, k, v = qkvu[..., : 3 * hidden].view(rows, tokens, 3, config.heads, -1).unbind(2)
    act = activation(config.qk_activation)
    q, k, v = act(q), act(k), activation(config.v_activation)(v)
    if mixer.lrpe is not None:
        q, k = mixer.lrpe((q, k), where)
    gate = activation(config.gate_activation)(qkvu[..., 3 * hidden :].reshape(rows * tokens, -1))
    if tokens == 1 and isinstance(state, Tensor):
        return _advance(q, k, v, layer.decay, used, state), gate
    assert isinstance(state, Tensor | RingState)
    return SlotState(state, slots).step(q, k, v, layer.log_decay), gate


def _advance(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, used: list[int], pool: Tensor
) -> Tensor:
    """One token of some rows: S = decay S + k v^T where it lies, o = q S, sums as the states are."""
    q_, k_, v_ = (x[:, 0].to(pool.dtype) for x in (q, k, v))
    o = torch.zeros_like(v_)
    for row, slot in enumerate(used):
        if slot < 0:
            continue
        state = pool[slot]
        if decay is not None:
            state.mul_(decay)
        state.addcmul_(k_[row].unsqueeze(2), v_[row].unsqueeze(1))
        o[row] = torch.bmm(q_[row].unsqueeze(1), state).squeeze(1)
    return o.unsqueeze(1).to(v.dtype)


def _layer(name: str, block: nn.Module, dtype: torch.dtype) -> _Layer:
    """What a step needs of a block, or NotImplementedError for the first part that it lacks."""
    assert isinstance(block, Block)
    mixer, glu = block.token_mixer, block.channel_mixer
    for part, kind, module in (("token", Lightning, mixer), ("channel", Glu, glu)):
        if type(module) is not kind:
            raise NotImplementedError(
                f"{name}.{part}_mixer is a {type(module).__name__}; expected a {kind.__name__} for "
                "fused steps; use fused=False"
            )
    assert isinstance(mixer, Lightning)
    assert isinstance(glu, Glu)
    config = mixer.config
    for field, legal in (("gate", "full"), ("gate_position", "after_norm")):
        if getattr(config, field) != legal:
            raise NotImplementedError(
                f"{name}.token_mixer.{field} is {getattr(config, field)!r}; expected {legal!r} for "
                "fused steps; use fused=False"
            )
    log_decay = mixer.log_decay(dtype)
    return _Layer(
        norm=_norm(block.token_norm),
        qkvu=_projection(mixer.qkvu_proj),
        mixer=mixer,
        gate_norm=_norm(mixer.norm),
        out=_projection(mixer.out_proj),
        glu_norm=_norm(block.channel_norm),
        gate=_projection(glu.gate_proj),
        up=_projection(glu.up_proj),
        activation=glu.activation,
        down=_projection(glu.down_proj),
        log_decay=log_decay,
        decay=None if log_decay is None else log_decay.exp().view(-1, 1, 1),
    )


def _norm(module: nn.Module) -> Function:
    """A norm; one without parameters over all channels is one call."""
    if isinstance(module, Norm) and module.config == NormConfig(eps=module.config.eps):
        return partial(F.rms_norm, normalized_shape=(module.dim,), eps=module.config.eps)
    return module


def _projection(module: nn.Linear) -> Function:
    """A projection of [rows, inputs], with the matrix on the left where its values are plain."""
    weight: Any = module.weight
    # Whoever adapts or quantises projections puts modules or weights of their own there.
    if type(module) is not nn.Linear or type(weight) not in (Tensor, nn.Parameter):
        return module
    return partial(_product, weight=weight.detach(), bias=module.bias)


def _product(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) > ROWS:
        return F.linear(x, weight, bias)
    y = few_rows.product(x, weight)
    return y if bias is None else y + bias
