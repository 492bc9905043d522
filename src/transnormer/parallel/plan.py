"""Which layouts of a model fit on so many devices, what each holds and sends, and how fast it is.

By formula, in a moment; ``plan_exact`` measures the memory of one layout on fake tensors. The models
are TransNormerLLM's: lightning attention and a gated linear unit in every block.

Memory of a rank, W ranks sharing the parameters of a copy and T the layers, N parameters, N_b those
of a block, E those of embedding and head, n tokens of a rank, L blocks, d model_dim, f glu width:

    parameters 4 N / (W T), optimizer 8 N / (W T), gradients up to 4 N / (W T), all float32
    gathered: 4 E / T, one block in use and one on its way, 2 x 2 N_b / T
    kept activations a block: 12 d n + (28 d + 6 f) n / T bytes, or 4 d n where blocks are computed
        again ("full")
    at work: the block that is computed again and its gradients, and what the head's loss needs

The coefficients of d and f count what autograd keeps under bfloat16 autocast, and what its backward
makes; they are set so that the formula agrees with the tracker.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from transnormer.models.cost import ModelCost
from transnormer.models.decoder import DecoderConfig
from transnormer.models.recompute import Checkpointing
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig
from transnormer.parallel.mesh import Axes

GIB = 2.0**30
# Room for the allocator's fragments, the driver and NCCL.
_USABLE = 0.92
_ROWS = (1, 2, 4, 8)


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
    layers: int
    dim: int
    heads: int
    glu: int
    parameters: float
    block: float
    outside: float
    key_dim: int


@cache
def _cost(config: DecoderConfig) -> ModelCost:
    # A model is built for it, without memory: seconds for the largest.
    return ModelCost.of(config)


@cache
def _sizes(config: DecoderConfig) -> _Sizes:
    """What the formulas need; NotImplementedError for another kind of model."""
    for index, block in enumerate(config.blocks):
        mixer, channel = block.token_mixer, block.channel_mixer
        if not isinstance(mixer, LightningConfig) or not isinstance(channel, GluConfig):
            raise NotImplementedError(
                f"blocks[{index}] is {mixer.kind!r}; expected lightning attention with a gated "
                "linear unit in every block: the formulas count those; take a tnl model"
            )
    last = config.blocks[-1]
    assert isinstance(last.token_mixer, LightningConfig)
    assert isinstance(last.channel_mixer, GluConfig)
    cost = _cost(config)
    outside = float(cost.parameters - cost.without_embeddings)
    layers = len(config.blocks)
    return _Sizes(
        layers,
        config.model_dim,
        last.token_mixer.heads,
        last.channel_mixer.hidden_dim,
        float(cost.parameters),
        cost.without_embeddings / layers,
        outside,
        (last.token_mixer.hidden_dim or config.model_dim) // last.token_mixer.heads,
    )


def memory_of(
    config: DecoderConfig, axes: Axes, tokens: int, checkpointing: Checkpointing
) -> Memory:
    """Memory of a rank that reads ``tokens`` tokens at once; see the module.

    Raises:
        NotImplementedError: a model that the formulas do not count; selective checkpointing.
    """
    if checkpointing == "selective":
        raise NotImplementedError(
            "checkpointing is 'selective'; expected 'none' or 'full': the formulas count those"
        )
    size, t, d = _sizes(config), axes.tp, config.model_dim
    held = axes.dp_shard * axes.sp * t
    share = 4.0 * size.parameters / held
    head, block = 4.0 * size.outside / t, 2.0 * size.block / t
    kept = (12.0 * d + (28.0 * d + 6.0 * size.glu) / t) * tokens
    if checkpointing == "none":
        # The peak is where the loss has been made and nothing was freed.
        work = 1.5 * head + 4.0 * d * tokens
        return Memory(share, 2 * share, 0.0, head + 2 * block, size.layers * kept, work)
    again = kept + (10.0 + 25.0 / t) * d * tokens
    reduced = 2.0 * block + block
    # Activations shrink while gradients grow: the peak is at one of the two ends.
    inputs = 4.0 * d * tokens * (size.layers - 1)
    work = again + reduced
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
    state = 4.0 * rows * size.heads / t * size.key_dim**2
    sequence = passes * size.layers * state * (axes.sp - 1)
    tensor = 2 * (t - 1) / t * 2 * passes * size.layers * 2.0 * size.dim * tokens
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
    size = _sizes(config)
    for tp in _divisors(devices):
        if tp > node or size.heads % tp or size.glu % tp:
            continue
        for sp in _divisors(devices // tp):
            # Parts of fewer tokens than this are cheaper read by one rank.
            if sp > 1 and seq // sp < 2048:
                continue
            for shard in _divisors(devices // (tp * sp)):
                yield Axes(devices // (tp * sp * shard), shard, sp, tp)


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
