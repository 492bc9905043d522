"""Sequence parallelism: one sequence on several ranks, applied to a finished model from outside."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.models import inputs
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Block, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.softmax_attention import SoftmaxAttentionCore
from transnormer.ops.cross_entropy import IGNORE_INDEX
from transnormer.parallel.collectives import Reduce
from transnormer.parallel.relay import Relay
from transnormer.parallel.sequence_cores import SequenceLinearCore
from transnormer.parallel.sequence_part import SequenceAxis, cut, even_lengths
from transnormer.parallel.sequence_softmax import SequenceSoftmaxCore
from transnormer.parallel.state_exchange import Chain, Exchange

# Mixers that move nothing along the sequence but through their core.
_BY_CORE = ("cosformer", "hgrn2", "lightning", "retention", "softmax")
_EXCHANGES = ("gather", "ring", "scan")


class LocalInputs(NamedTuple):
    """This rank's part of a batch, as ``Decoder.loss`` takes it.

    Attributes:
        input_ids, labels, positions: [batch, own tokens]; labels are None where none were given.
        cu_seqlens, mask: of the part; None as given.
    """

    input_ids: Tensor
    labels: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor | None
    mask: Tensor | None


class SequenceParallelDecoder(Decoder):
    """A decoder whose ``loss`` cuts every sequence among the ranks of a group.

    ``apply_sequence_parallel`` makes one of a finished model; names and values of its parameters stay
    as they are. Every rank of the group holds the same parameters, is given the same batch, and
    gets the same loss; the gradients of a rank are those of its part, to be summed over the group.
    Any other call reads the whole input on this rank alone.
    """

    axis: SequenceAxis

    def loss(self, input_ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """As ``Decoder.loss``, of the whole batch.

        Args:
            input_ids, labels: [batch, seq] of whole sequences, the same on all ranks.
            options: as ``Decoder.loss``'s, and ``lengths``: tokens of each rank's part, None for
                parts as equal as possible.

        Raises:
            NotImplementedError: ``state`` or ``shape`` is given.
            ValueError: as ``Decoder.loss``; lengths that do not fit; fewer tokens than ranks.
        """
        reduction = options.pop("reduction", "mean")
        for name in ("state", "shape"):
            if options.pop(name, None) is not None:
                raise NotImplementedError(
                    f"{name} is given; expected None for sequences in parts on several ranks"
                )
        local = self.cut(input_ids, labels, **options)
        assert local.labels is not None
        self._reads_part = True
        try:
            own = super().loss(
                local.input_ids, local.labels, reduction="sum", positions=local.positions,
                cu_seqlens=local.cu_seqlens, mask=local.mask,
            )  # fmt: skip
        finally:
            self._reads_part = False
        total = Reduce.apply(own, self.axis.chain.group)
        if reduction == "sum":
            return total
        if reduction != "mean":
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
        return total / (labels != IGNORE_INDEX).sum().clamp(min=1)

    _reads_part = False

    def cut(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> LocalInputs:
        """This rank's part of a batch; the layers know from now on how it was cut."""
        inputs.check(input_ids, self.config.vocab_size, None, cu_seqlens, mask, self.config.causal)
        mask = inputs.needed_mask(mask)
        chain, seq = self.axis.chain, input_ids.shape[1]
        where = inputs.positions_of(input_ids, None, positions, cu_seqlens, mask)
        part, bounds = cut(
            seq,
            chain.rank,
            even_lengths(seq, chain.size) if lengths is None else lengths,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        self.axis.part = part
        own = slice(part.start, part.end)
        return LocalInputs(
            input_ids[:, own],
            None if labels is None else labels[:, own],
            where[:, own],
            bounds,
            None if mask is None else mask[:, own],
        )

    def hidden(self, *args: Any, **kwargs: Any) -> tuple[Tensor, DecoderState | None]:
        """As ``Decoder.hidden``, of this rank's part within ``loss`` and of whole inputs else."""
        if not self._reads_part:
            self.axis.part = None
        # The part stays set behind ``loss``: blocks may be computed again in the backward pass.
        return super().hidden(*args, **kwargs)


def apply_sequence_parallel(
    model: Decoder,
    group: dist.ProcessGroup | None = None,
    *,
    exchange: Exchange = "gather",
    overlap: bool = False,
    prune: bool = True,
) -> SequenceParallelDecoder:
    """Let the ranks of a group read each sequence together, each a part of it; changes the model.

    Linear layers exchange states, whose size does not depend on the length: LASP. Softmax layers
    gather keys and values. Layers of other kinds hand their whole state from rank to rank, one
    after the other (``relay``). Loss and gradients are those of one process up to rounding, whatever
    the number of ranks. Compiled blocks (``compile_blocks`` with whole=False) leave their graphs for
    attention over parts.

    Args:
        model: the same on every rank.
        group: the ranks, in the order of the parts; None is all processes.
        exchange: "gather", "ring" or "scan", see ``Chain``.
        overlap: see ``SequenceAxis``.
        prune: see ``SequenceAxis``.

    Raises:
        ValueError: an unknown exchange.
        NotImplementedError: a layer that has no such form; named with the reason.
        TypeError: not a Decoder.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model is a {type(model).__name__}; expected a Decoder")
    if exchange not in _EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}; expected one of {', '.join(_EXCHANGES)}")
    for index, block in enumerate(model.config.blocks):
        if (reason := why_not_in_parts(model, index)) is not None:
            raise NotImplementedError(
                f"blocks[{index}].token_mixer.kind is {block.token_mixer.kind!r}: {reason}; "
                "expected another mixer, or parallel.sp = 1"
            )
    chain = Chain(group, dist.get_rank(group), dist.get_world_size(group), exchange)
    axis = SequenceAxis(chain, overlap=overlap, prune=prune)
    for module in list(model.modules()):
        if isinstance(module, Block):
            _apply(module, axis)
    # A class, not a wrapper: names and copies stay as they are.
    model.__class__ = SequenceParallelDecoder
    assert isinstance(model, SequenceParallelDecoder)
    model.axis = axis
    return model


def why_not_in_parts(model: Decoder, layer_index: int) -> str | None:
    """Why a layer cannot read sequences in parts on several ranks; None where it can."""
    mixer = model.config.blocks[layer_index].token_mixer
    if mixer.kind in _BY_CORE:
        if getattr(mixer, "lrpe_axes", 1) > 1:
            return "it turns by the coordinates of a grid, which has no one order to cut"
        return None
    if not model.config.causal:
        return "a bidirectional layer of this kind has no state that could be exchanged"
    layer = model.empty_state(1, device="meta").layers[layer_index]
    if bytes_per_token(layer):
        return "its state holds every token read so far"
    return None


def _apply(block: Block, axis: SequenceAxis) -> None:
    mixer = block.token_mixer
    core = getattr(mixer, "core", None)
    kind = getattr(getattr(mixer, "config", None), "kind", "")
    part: Any
    if kind not in _BY_CORE:
        part, outside = Relay(mixer, axis), ("receive", "send")
    elif isinstance(core, SoftmaxAttentionCore):
        part, outside = SequenceSoftmaxCore(core, axis), ("in_parts",)
        mixer.core = part
    else:
        assert isinstance(core, LinearAttentionCore)
        part, outside = SequenceLinearCore(core, axis), ("in_parts", "joint_in_parts")
        mixer.core = part
    if block._compiled_call_impl is not None:
        # Graphs hold no messages, nor how this rank's part of a batch was cut.
        for name in outside:
            setattr(part, name, torch.compiler.disable(getattr(part, name)))
