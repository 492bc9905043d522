"""Which layouts of a model fit on so many devices, what each holds and sends, and how fast it is.

By formula, in a moment; ``plan_exact`` measures the memory of one layout on fake tensors.

Memory of a rank, W ranks sharing the parameters of a copy and T the layers, N parameters, N_b those
of a block, E those of embedding and head, n tokens of a rank, d model_dim, f glu width, V vocabulary:

    parameters 4 N / (W T), optimizer 8 N / (W T), gradients up to 4 N / (W T), all float32
    gathered: 4 E / T, one block in use and one on its way, 2 x 2 N_b / T
    kept activations a block: 12 d n + (28 d + 6 f) n / T bytes, or 4 d n where blocks are computed
        again ("full"); 3 d n more where T > 1
    at work: the block that is computed again and its gradients, or what the head's loss needs

The coefficients of d and f are those of TransNormerLLM's blocks, lightning attention and a gated
linear unit: what autograd keeps under bfloat16 autocast, and what its backward makes; they are set so
that the formula agrees with the tracker. What blocks of other kinds keep is counted (``plan_blocks``).

Formula and tracker count a rank that shares parameters with nobody (W = 1) as FSDP over one rank, which
a run leaves out: autograd then keeps the rounded weights of all blocks that are neither compiled nor
computed again, 2 N_b / T each, where here two blocks' are counted.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.recompute import Checkpointing
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig
from transnormer.parallel.mesh import Axes
from transnormer.parallel.plan_blocks import Kept, kept_by
from transnormer.parallel.sequence import why_not_in_parts
from transnormer.parallel.tensor_loss import LOGITS
from transnormer.parallel.tensor_rules import why_not_on_ranks

GIB = 2.0**30
# Room for the allocator's fragments, the driver and NCCL.
_USABLE = 0.92
_ROWS = (1, 2, 4, 8)
# Bytes of the loss for each logit that it works on at a time: 16 bits, and float32 four times.
_LOGIT_BYTES = 18.0
# What the backward of a block makes, of what its forward keeps inside.
_GRADIENTS = 0.57


class Machine(NamedTuple):
    """What the plan takes the devices to be.

    Attributes:
        memory: bytes of a device.
        peak: operations a second in bfloat16.
        efficiency: share of the peak that the model's products reach where nothing is waited for.
        node: devices of one host.
        inside, between: bytes a second that a device sends within its host, and between hosts.
    """

    memory: float = 80e9
    peak: float = 989.4e12
    efficiency: float = 0.5
    node: int = 8
    inside: float = 300e9
    between: float = 40e9


class Memory(NamedTuple):
    """Bytes of a rank at its peak, by part."""

    parameters: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    at_work: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class Plan(NamedTuple):
    """One layout.

    Attributes:
        axes: ranks along each axis.
        rows: sequences that a rank reads at once.
        checkpointing: what blocks keep.
        memory: of a rank.
        sent: bytes that a rank sends a step, by axis.
        seconds: of a step of one pass.
        tokens: of a step, over all ranks.
        mfu: share of the devices' peak that the model's own operations are.
    """

    axes: Axes
    rows: int
    checkpointing: Checkpointing
    memory: Memory
    sent: dict[str, float]
    seconds: float
    tokens: int
    mfu: float


class _Sizes(NamedTuple):
    """What the formulas need of a model.

    Attributes:
        layers, branches: blocks; token and channel mixers.
        parameters, block, outside: of the model, a block, embedding and head.
        kept: of a block, the mean.
        state, growing: bytes of a sequence's state in all layers, and what a token adds to it.
    """

    layers: int
    branches: int
    parameters: float
    block: float
    outside: float
    kept: Kept
    state: float
    growing: float


@cache
def _cost(config: DecoderConfig) -> ModelCost:
    # A model is built for it, without memory: seconds for the largest.
    return ModelCost.of(config)


@cache
def _meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def has_formula(config: DecoderConfig) -> bool:
    """Whether the formula knows what all blocks keep; what others keep is counted."""
    return all(
        isinstance(block.token_mixer, LightningConfig)
        and isinstance(block.channel_mixer, GluConfig)
        for block in config.blocks
    )


def _kept(config: DecoderConfig, index: int) -> Kept:
    block, dim = config.blocks[index], config.model_dim
    if has_formula(config):
        assert isinstance(block.channel_mixer, GluConfig)
        return Kept(12.0 * dim, 28.0 * dim + 6.0 * block.channel_mixer.hidden_dim)
    # One of each kind.
    return kept_by(config, config.blocks.index(block))


@cache
def _sizes(config: DecoderConfig) -> _Sizes:
    cost, layers = _cost(config), len(config.blocks)
    kept = [_kept(config, index) for index in range(layers)]
    return _Sizes(
        layers,
        sum(1 if block.channel_mixer is None else 2 for block in config.blocks),
        float(cost.parameters),
        cost.without_embeddings / layers,
        float(cost.parameters - cost.without_embeddings),
        Kept(*(sum(parts) / layers for parts in zip(*kept, strict=True))),
        float(cost.constant_state_bytes),
        float(cost.state_bytes_per_token),
    )


def memory_of(
    config: DecoderConfig,
    axes: Axes,
    tokens: int,
    checkpointing: Checkpointing,
    *,
    cut_residual: bool = False,
) -> Memory:
    """Memory of a rank that reads ``tokens`` tokens at once; see the module.

    Raises:
        NotImplementedError: a bidirectional model that the formula does not know; selective
            checkpointing.
    """
    if checkpointing == "selective":
        raise NotImplementedError(
            "checkpointing is 'selective'; expected 'none' or 'full': the formulas count those"
        )
    size, t, d = _sizes(config), axes.tp, config.model_dim
    held = axes.dp_shard * axes.sp * t
    share = 4.0 * size.parameters / held
    head, block = 4.0 * size.outside / t, 2.0 * size.block / t
    # Of the stream a third is what the projections read, whole on every rank.
    stream = 4.0 * d / (t if cut_residual else 1)
    outside = size.kept.outside * ((1.0 + 2.0 / t) / 3.0 if cut_residual else 1.0)
    outside += 3.0 * d if t > 1 else 0.0
    kept = (outside + size.kept.inside / t) * tokens
    loss = 4.0 * d * tokens
    if t > 1:
        loss += _LOGIT_BYTES * min(LOGITS, tokens * config.vocab_size / t)
    if checkpointing == "none":
        # The peak is where the loss has been made and nothing was freed.
        work = 4.0 * d * tokens + 1.5 * head if t == 1 else loss
        return Memory(share, 2 * share, 0.0, head + 2 * block, size.layers * kept, work)
    again = kept + (10.0 * d + _GRADIENTS * size.kept.inside / t) * tokens
    reduced = 2.0 * block + block
    # Activations shrink while gradients grow: the peak is at one of the two ends.
    inputs = stream * tokens * (size.layers - 1)
    work = max(again + reduced, loss if t > 1 else 0.0)
    grown = share if share > inputs else 0.0
    left = 0.0 if grown else inputs
    return Memory(share, 2 * share, grown, head + 2 * block, left, work)


def sent_by(
    config: DecoderConfig, axes: Axes, tokens: int, checkpointing: Checkpointing, rows: int = 1
) -> dict[str, float]:
    """Bytes that a rank sends a step of one pass, by axis; ``tokens`` are those of all its rows."""
    size, t = _sizes(config), axes.tp
    held = axes.dp_shard * axes.sp
    part = (held - 1) / held
    passes = 3 if checkpointing == "full" else 2
    blocks = size.layers * size.block / t
    # Parameters forward and backward in bfloat16 (the rest in float32), gradients in float32.
    fsdp = part * (2 * 2 * blocks + 4 * blocks + 3 * 4 * size.outside / t)
    replicas = 2 * (axes.dp_replicate - 1) / axes.dp_replicate * 4 * size.parameters / (held * t)
    # States of linear layers; keys and values of softmax layers.
    sequence = passes * (axes.sp - 1) * (rows * size.state + tokens * size.growing) / t
    tensor = 2 * (t - 1) / t * passes * size.branches * 2.0 * config.model_dim * tokens
    return {"dp_shard": fsdp, "dp_replicate": replicas, "sp": sequence, "tp": tensor}


def layouts(
    config: DecoderConfig, devices: int, seq: int, machine: Machine | None = None
) -> list[Plan]:
    """The layouts of so many devices whose memory suffices, the fastest first.

    Passes of 1, 2, 4 and 8 sequences are tried. The exchange of parameters and gradients runs beside the products; that of tensor parallelism is waited for.

    Args:
        config: the model.
        devices: in all.
        seq: tokens of a sequence.
        machine: the devices; None is an H100 of 80 GB with 8 a host.

    Raises:
        NotImplementedError: a model that the formulas do not count.
        ValueError: devices or seq below 1.
    """
    for name, value in (("devices", devices), ("seq", seq)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    machine = machine or Machine()
    found = []
    for axes in _all_axes(config, devices, seq, machine.node):
        for checkpointing in ("none", "full"):
            for rows in _ROWS:
                plan = _plan(config, axes, seq, rows, checkpointing, machine)
                if plan.memory.total <= _USABLE * machine.memory:
                    found.append(plan)
    return sorted(found, key=lambda plan: plan.seconds / plan.tokens)


def _all_axes(config: DecoderConfig, devices: int, seq: int, node: int) -> Iterator[Axes]:
    for tp in _divisors(devices):
        if tp > node or not _can_share(config, tp):
            continue
        for sp in _divisors(devices // tp):
            # Parts of fewer tokens than this are cheaper read by one rank.
            if sp > 1 and (seq // sp < 2048 or not _can_be_cut(config)):
                continue
            for shard in _divisors(devices // (tp * sp)):
                yield Axes(devices // (tp * sp * shard), shard, sp, tp)


@cache
def _can_share(config: DecoderConfig, ranks: int) -> bool:
    blocks = range(len(config.blocks))
    return ranks == 1 or not any(why_not_on_ranks(_meta(config), i, ranks) for i in blocks)


@cache
def _can_be_cut(config: DecoderConfig) -> bool:
    return not any(why_not_in_parts(_meta(config), i) for i in range(len(config.blocks)))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _plan(
    config: DecoderConfig,
    axes: Axes,
    seq: int,
    rows: int,
    checkpointing: Checkpointing,
    machine: Machine,
) -> Plan:
    own = rows * -(-seq // axes.sp)
    sent = sent_by(config, axes, own, checkpointing, rows)
    forward = _cost(config).flops((seq + 1) // 2).total
    wanted = 3.0 * forward * own / axes.tp
    done = wanted * (4.0 / 3.0 if checkpointing == "full" else 1.0)
    compute = done / (machine.peak * machine.efficiency)

    def rate(ranks: int) -> float:
        return machine.inside if ranks <= machine.node else machine.between

    near = axes.tp * axes.sp
    beside = sent["dp_shard"] / rate(near * axes.dp_shard)
    beside += sent["dp_replicate"] / rate(axes.ranks)
    waited = sent["tp"] / rate(axes.tp) + sent["sp"] / rate(near)
    seconds = max(compute, beside) + waited
    return Plan(
        axes,
        rows,
        checkpointing,
        memory_of(config, axes, own, checkpointing),
        sent,
        seconds,
        rows * seq * axes.dp_replicate * axes.dp_shard,
        wanted / seconds / machine.peak,
    )
