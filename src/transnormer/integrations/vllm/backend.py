"""What the layers read about a step of vLLM's scheduler: slots, bounds, new sequences.

Made once a step and not once a layer, from counts that the host has anyway: nothing waits for the
device.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


@dataclass
class SlotMetadata(LinearAttentionMetadata):
    """A step: ``num_decodes`` sequences of one token each, then sequences of any length.

    Attributes:
        slots: int32 [num_decodes], the state of each sequence; -1 for rows that are padding.
        read_slots: int64 [num_prefills], that of each of the others.
        read_bounds: int32 [num_prefills + 1], their first tokens, counted from that of the first.
        num_tokens: tokens of this step without the padding behind them.
    """

    slots: Tensor
    read_slots: Tensor
    read_bounds: Tensor
    num_tokens: int


class SlotMetadataBuilder(LinearAttentionMetadataBuilder):
    """Makes ``SlotMetadata``, and clears the states of sequences that begin.

    A one-token prompt counts as a decode, which would go on from what the slot's last owner left,
    and a CUDA graph of a decode step has no branch for it. Hence states are cleared here, before the
    step.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = vllm_config.scheduler_config.max_num_seqs
        rows = max(rows, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        # CUDA graphs read the same memory at every replay.
        self._slots = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SlotMetadata:
        """The metadata of one step; vLLM's own fields are kept beside ours."""
        base = super().build(common_prefix_len, common_attn_metadata, fast_build)
        blocks, decodes = base.state_indices_tensor, base.num_decodes
        starts = common_attn_metadata.query_start_loc_cpu
        self._clear(blocks, starts, common_attn_metadata.seq_lens_cpu_upper_bound)
        slots = self._slots[:decodes]
        # Padding has the null block; several rows of a step may not share a slot.
        slots.copy_(blocks[:decodes].masked_fill(blocks[:decodes] <= NULL_BLOCK_ID, -1))
        return SlotMetadata(
            **{field.name: getattr(base, field.name) for field in fields(LinearAttentionMetadata)},
            slots=slots,
            read_slots=blocks[decodes:].long(),
            read_bounds=base.query_start_loc[decodes:] - decodes,
            num_tokens=max(int(starts[-1]), decodes),
        )

    def _clear(self, blocks: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Zero the states of sequences whose first token is in this step."""
        tokens = starts.diff()
        new = ((lengths[: len(tokens)] == tokens) & (tokens > 0)).nonzero()[:, 0]
        if not len(new):
            return
        slots = blocks[new.to(blocks.device, non_blocking=True)].long()
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            layers[name].pool.index_fill_(0, slots, 0.0)


class SlotBackend(LinearAttentionBackend):
    """vLLM's linear attention with metadata of our own."""

    @staticmethod
    def get_name() -> str:
        """What logs call it."""
        return "TRANSNORMER"

    @staticmethod
    def get_builder_cls() -> type[SlotMetadataBuilder]:
        """Who makes the metadata."""
        return SlotMetadataBuilder
