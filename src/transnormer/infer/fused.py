"""A decoding step of a TransNormerLLM as few kernels as it takes, on the states of a pool."""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.infer.quantize import four_bits
from transnormer.models.decoder import Block, Decoder
from transnormer.models.quantized_weights import ByRowsLinear
from transnormer.nn.channel_mixers.glu import Glu
from transnormer.nn.norms import Norm
from transnormer.nn.state import LayerState, SlotState
from transnormer.nn.token_mixers.lightning import Lightning
from transnormer.ops import RingState, decode

# Whether a kernel begins while the one before it ends (programmatic dependent launch).
OVERLAP: bool = True
# The most rows whose products kernels form; more are left to the model's modules.
ROWS: int = 64


def likeliest(logits: Tensor, limit: int | None) -> Tensor | None:
    """The likeliest token below a limit for each of [rows, tokens, vocab_size], on a GPU.

    Returns:
        int64 [2, rows, tokens]: tokens, and 1 where the largest logit is NaN or infinite; None where
        kernels do not run, or for float64, which they would round.
    """
    where = logits.device
    if where.type != "cuda" or logits.dtype == torch.float64 or decode.why_not(where) is not None:
        return None
    from transnormer.ops.decode import triton_pointwise

    rows, tokens, size = logits.shape
    flat = logits.reshape(-1, size)
    return triton_pointwise.best(flat, limit, overlap=OVERLAP).view(2, rows, tokens)


class _Layer(NamedTuple):
    """What a step needs of a block, looked up once."""

    mixer: Lightning
    glu: Glu
    glu_activation: str
    eps: tuple[float, float, float]
    theta: Tensor | None
    log_decay: Tensor | None


class FusedStep:
    """The decoding step of ``Decoder``, with all that lies between its products in single kernels.

    A single row has five kernels a layer: norm and projection; activations, LRPE, state and output;
    norm, gate, projection and sum; norm, both projections of the GLU and their product; projection
    and sum. Weights are then read by these kernels, in the model's dtype, in int8, or in 4 bits
    where groups are a power of two of at least 32 and scales bfloat16; those of 4 bits are packed
    anew, so that they are in memory twice. Up to 64 rows in bfloat16 or float16 have six kernels,
    since the gate has its own. More rows have ten, and so has every step where a projection is a
    module or a weight of another kind: the products are the model's own modules then, and kernels
    do what lies between them. Rings take no kernels more where a row has one token and the
    batch more than one row.

    It computes what the model does, with roundings to the activations' dtype in the same places but
    one: where kernels form a product, a norm divides it, and in the model its operand.

    Args:
        model: a TransNormerLLM in eval mode; not to be changed while this lives.

    Raises:
        NotImplementedError: a part of the model that the kernels do not have; it is named.
        RuntimeError: no Triton, or a device that it does not run on.
    """

    def __init__(self, model: Decoder) -> None:
        device = model.embedding.weight.device
        reason = decode.why_not(device)
        if reason is not None:
            raise RuntimeError(f"fused is True; expected False here: {reason}")
        from transnormer.ops.decode import (
            triton_nibbles,
            triton_pointwise,
            triton_projection,
            triton_ring_mix,
        )

        self._pointwise, self._projection = triton_pointwise, triton_projection
        self._nibbles, self._rings = triton_nibbles, triton_ring_mix
        _check(model)
        self._table, self._head = model.embedding.weight, model.head_weight
        self._scale = math.sqrt(model.config.model_dim) if model.config.embedding_scale else 1.0
        self._final_eps = model.config.final_norm.eps
        self._layers = [
            _layer(block, config.channel_mixer, self._table.dtype)
            for block, config in zip(model.blocks, model.config.blocks, strict=True)
        ]
        # Of each layer qkvu, out, gate, up and down, where kernels can read all of them.
        self._matrices: list[list[Any]] | None = []
        for layer in self._layers:
            found = [self._matrix(module) for module in _projections(layer)]
            if None in found or not _alike(*found[2:4]):
                self._matrices = None
                break
            self._matrices.append(found)
        half = self._table.dtype in (torch.bfloat16, torch.float16)
        every = [matrix for found in self._matrices or () for matrix in found]
        plain = [isinstance(x, triton_projection.Matrix) and x.scales is None for x in every]
        self._half = half and bool(every) and all(plain)
        most = max((len(matrix[0]) for matrix in every), default=0)
        self._arrived = torch.zeros(-(-most // 16), dtype=torch.int32, device=device)

    def _matrix(self, module: nn.Linear) -> Any:
        """A projection's weight as kernels read it, or None."""
        # Whoever adapts projections puts modules of their own there.
        if type(module) not in (nn.Linear, ByRowsLinear):
            return None
        weight: Any = module.weight
        if type(weight) in (Tensor, nn.Parameter):
            return self._projection.Matrix(weight.detach()) if weight.is_contiguous() else None
        parts = four_bits(weight)
        if parts is not None:
            return self._nibbles.pack(*parts)
        values, scales = getattr(weight, "qdata", None), getattr(weight, "scale", None)
        if values is None or scales is None or values.dtype != torch.int8:
            return None
        zeros = getattr(weight, "zero_point", None)
        one_a_row = scales.numel() == module.out_features and values.shape == weight.shape
        if not one_a_row or (zeros is not None and bool(zeros.any())):
            return None
        return self._projection.Matrix(values.contiguous(), scales.contiguous())

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        states: list[LayerState],
    ) -> Tensor:
        """Advance slots by some tokens each; logits [rows, tokens, vocab_size].

        Args:
            ids: int32 or int64 [rows, tokens].
            slots: int32 [rows]; a row with -1 changes no state, and its logits mean nothing.
            positions: int64 [slots], where each slot stands; moved on by the tokens.
            states: a pool or ring of each layer, advanced in place.
        """
        # Kernels walk no strides here; what graphs read lies so already.
        ids, slots = ids.contiguous(), slots.contiguous()
        x, where = self._pointwise.begin(
            ids, slots, self._table, positions, self._scale, overlap=OVERLAP
        )
        # Several rows in half precision only, since tensor cores round float32.
        few = self._matrices is not None and (len(x) == 1 or self._half) and len(x) <= ROWS
        run = self._products if few else self._many
        return run(x, where, ids.shape, slots, states).view(*ids.shape, -1)

    def _products(
        self,
        x: Tensor,
        where: Tensor,
        shape: torch.Size,
        slots: Tensor,
        states: list[LayerState],
    ) -> Tensor:
        assert self._matrices is not None
        single = len(x) == 1
        project = self._projection.project if single else self._project_rows
        project = functools.partial(project, overlap=OVERLAP)
        for layer, matrices, state in zip(self._layers, self._matrices, states, strict=True):
            (qkvu_proj, out, gate, up, down), eps = matrices, layer.eps
            qkvu = project(x, qkvu_proj, eps=eps[0])
            if single:
                o, u = self._mix(layer, qkvu, where, shape, slots, state)
                act = layer.mixer.config.gate_activation
                project(o, out, gate=u, gate_activation=act, eps=eps[1], residual=x)
            else:
                project(self._mix_gated(layer, qkvu, where, shape, slots, state), out, residual=x)
            y = project(x, gate, second=up, activation=layer.glu_activation, eps=eps[2])
            project(y, down, residual=x)
        if single:
            return project(x, self._projection.Matrix(self._head), eps=self._final_eps)
        # The head is the largest matrix, and library products are at their best there.
        y = self._pointwise.add_norm(x, None, self._final_eps, overlap=OVERLAP)
        return F.linear(y, self._head)

    def _project_rows(
        self, x: Tensor, matrix: Any, *, second: Any = None, **options: Any
    ) -> Tensor:
        """Rows times a matrix, or two."""
        other = None if second is None else second.values
        project = self._projection.project_rows
        return project(x, matrix.values, second=other, arrived=self._arrived, **options)

    def _many(
        self,
        x: Tensor,
        where: Tensor,
        shape: torch.Size,
        slots: Tensor,
        states: list[LayerState],
    ) -> Tensor:
        kernels, y = self._pointwise, None
        for layer, state in zip(self._layers, states, strict=True):
            mixer, glu, eps = layer.mixer, layer.glu, layer.eps
            qkvu = mixer.qkvu_proj(kernels.add_norm(x, y, eps[0], overlap=OVERLAP))
            y = mixer.out_proj(self._mix_gated(layer, qkvu, where, shape, slots, state))
            h = kernels.add_norm(x, y, eps[2], overlap=OVERLAP)
            gate, up = glu.gate_proj(h), glu.up_proj(h)
            y = glu.down_proj(kernels.product(gate, up, layer.glu_activation, overlap=OVERLAP))
        return F.linear(kernels.add_norm(x, y, self._final_eps, overlap=OVERLAP), self._head)

    def _mix_gated(
        self,
        layer: _Layer,
        qkvu: Tensor,
        where: Tensor,
        shape: torch.Size,
        slots: Tensor,
        state: LayerState,
    ) -> Tensor:
        """The heads' outputs, normed and gated, [rows * tokens, hidden_dim]."""
        config = layer.mixer.config
        gate = functools.partial(
            self._pointwise.norm_gate,
            eps=layer.eps[1],
            activation=config.gate_activation,
            overlap=OVERLAP,
        )
        if isinstance(state, RingState) and shape[1] == 1 and self._rings.fits(state):
            acts = (config.qk_activation, config.v_activation)
            arguments = (qkvu, where, layer.theta, layer.log_decay, state, slots, config.heads)
            o = self._rings.ring_mix(*arguments, *acts, overlap=OVERLAP)
            u = qkvu[:, 3 * config.heads * layer.mixer.head_dim :]
            return gate(o, u, ring=state, slots=slots)
        return gate(*self._mix(layer, qkvu, where, shape, slots, state))

    def _mix(
        self,
        layer: _Layer,
        qkvu: Tensor,
        where: Tensor,
        shape: torch.Size,
        slots: Tensor,
        state: LayerState,
    ) -> tuple[Tensor, Tensor]:
        """The heads' outputs, [rows * tokens, hidden_dim], and the gate before its activation."""
        mixer = layer.mixer
        config, rows, heads = mixer.config, len(qkvu), mixer.config.heads
        u = qkvu[:, 3 * heads * mixer.head_dim :]
        acts = (config.qk_activation, config.v_activation)
        if isinstance(state, Tensor) and shape[1] == 1:
            arguments = (qkvu, where, layer.theta, layer.log_decay, state, slots, heads, *acts)
            return self._pointwise.mix(*arguments, overlap=OVERLAP), u
        assert isinstance(state, Tensor | RingState)
        arguments = (qkvu, where, layer.theta, heads, mixer.head_dim, *acts)
        q, k, v = (
            part.view(*shape, *part.shape[1:])
            for part in self._pointwise.queries(*arguments, overlap=OVERLAP)
        )
        o = SlotState(state, slots).step(q, k, v, layer.log_decay)
        return o.reshape(rows, -1), u


def _alike(matrix: Any, other: Any) -> bool:
    """Whether one kernel can read both: weights of one dtype, as many groups, scales or none."""
    if type(matrix) is not type(other):
        return False
    one, two = ([getattr(part, "dtype", part) for part in x] for x in (matrix, other))
    return one == two


def _projections(layer: _Layer) -> tuple[nn.Linear, ...]:
    mixer, glu = layer.mixer, layer.glu
    return (mixer.qkvu_proj, mixer.out_proj, glu.gate_proj, glu.up_proj, glu.down_proj)


def _layer(block: nn.Module, config: Any, dtype: torch.dtype) -> _Layer:
    assert isinstance(block, Block)
    mixer, glu = block.token_mixer, block.channel_mixer
    assert isinstance(mixer, Lightning)
    assert isinstance(glu, Glu)
    norms = (block.token_norm, mixer.norm, block.channel_norm)
    eps = tuple(norm.config.eps for norm in norms if isinstance(norm, Norm))
    theta = None if mixer.lrpe is None else mixer.lrpe.theta[:, 0].detach().contiguous()
    eps = (eps[0], eps[1], eps[2])
    return _Layer(mixer, glu, config.activation, eps, theta, mixer.log_decay(dtype))


def _check(model: Decoder) -> None:
    """Raise NotImplementedError for the first field that the kernels do not have."""
    config = model.config
    facts: list[tuple[str, object, tuple[object, ...]]] = [
        ("max_positions", config.max_positions, (0,)),
        ("dtype", model.embedding.weight.dtype, (torch.float32, torch.bfloat16, torch.float16)),
    ]
    norms: list[tuple[str, object]] = [("final_norm", config.final_norm)]
    for i, block in enumerate(config.blocks):
        name, mixer, glu = f"blocks[{i}]", block.token_mixer, block.channel_mixer
        facts.append((f"{name}.token_mixer.kind", mixer.kind, ("lightning",)))
        facts.append((f"{name}.channel_mixer.kind", getattr(glu, "kind", None), ("glu",)))
        norms.append((f"{name}.norm", block.norm))
        norms.append((f"{name}.token_mixer.norm", getattr(mixer, "norm", None)))
        fields: list[tuple[object, str, tuple[object, ...]]] = [
            (mixer, "bias", (False,)),
            (mixer, "gate", ("full",)),
            (mixer, "gate_position", ("after_norm",)),
            (mixer, "lrpe_form", ("doubled",)),
            (mixer, "qk_activation", decode.ACTIVATIONS),
            (mixer, "v_activation", decode.ACTIVATIONS),
            (mixer, "gate_activation", decode.ACTIVATIONS),
            (glu, "bias", (False,)),
            (glu, "activation", decode.ACTIVATIONS),
        ]
        for part, field, legal in fields:
            where = f"{name}.{'channel' if part is glu else 'token'}_mixer.{field}"
            facts.append((where, getattr(part, field, None), legal))
    for name, norm in norms:
        facts.append((f"{name}.kind", getattr(norm, "kind", None), ("srms",)))
        facts.append((f"{name}.groups", getattr(norm, "groups", 1), (1,)))
        facts.append((f"{name}.eps_outside", getattr(norm, "eps_outside", False), (False,)))
    for name, value, legal in facts:
        if value not in legal:
            raise NotImplementedError(
                f"{name} is {value!r}; expected one of {list(legal)} for fused steps; use fused=False"
            )
