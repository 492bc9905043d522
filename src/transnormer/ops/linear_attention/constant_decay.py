"""Linear attention with constant decay or a gate a head as torch ops whose kernels are Triton's.

The backward op computes the states between the segments of a sequence again instead of keeping
them: how many there are depends on the length, and a compiled graph would hold for few lengths.

``attention_ops`` has the ops' contract for torch, ``triton_launch`` what they run; this file needs no
Triton.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.attention_ops import define_attention
from transnormer.ops.linear_attention.launch_config import Gpu

# For tokens that are a part of longer rows: takes the state that they leave from zero, [sequences,
# heads, key_dim, value_dim], and returns the one that enters before them, both in float32.
Exchange = Callable[[Tensor], Tensor]


class Plan(NamedTuple):
    """How the tokens of a call are cut into units of at most ``length`` tokens."""

    units: int
    length: int
    segments: int  # of each sequence; 0 where sequences are packed
    carried: bool  # whether a state passes from unit to unit
    pieces: int = 1  # of each unit, to sum what it adds to the state


@cache
def gpu_of(device: torch.device) -> Gpu:
    """What matters of a GPU; an H100 for what is none (the interpreter)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    # The stubs of torch's CPU build lack it.
    shared = properties.shared_memory_per_block_optin  # pyrefly: ignore[missing-attribute]
    return Gpu(properties.multi_processor_count, shared)


def plan(
    batch: int, seq: int, heads: int, device: torch.device, sequences: int | None = None
) -> Plan:
    """The cut of a call, with ``sequences`` packed; shapes alone decide: nothing waits for the device."""
    gpu = gpu_of(device)
    if sequences is not None:
        length = launch_config.packed_length(heads, seq, gpu)
        return Plan(sequences + seq // length, length, 0, True)
    segments = launch_config.segments_of(batch * heads, seq, gpu)
    if segments == 1:
        return Plan(batch, seq, 1, False)
    pieces = launch_config.pieces_of(batch * heads, seq, segments, gpu)
    length = -(-seq // (segments * pieces * 64)) * pieces * 64
    return Plan(batch * segments, length, segments, True, pieces)


def plan_with_sums(batch: int, seq: int, heads: int, device: torch.device) -> Plan:
    """``plan`` of rows whose sums are wanted whatever their length: one segment has pieces too."""
    found = plan(batch, seq, heads, device)
    if found.carried:
        return found
    # As the first of two: the only one that hands something on.
    pieces = launch_config.pieces_of(batch * heads, seq, 2, gpu_of(device))
    length = -(-seq // (pieces * 64)) * pieces * 64
    return Plan(batch, length, 1, True, pieces)


constant_decay_attention = define_attention("constant_decay_attention", "triton_launch")
scalar_gate_attention = define_attention("scalar_gate_attention", "triton_launch")
