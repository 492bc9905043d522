"""Maths on tensors: the ops of the package, usable with torch alone."""

from transnormer.ops import decay
from transnormer.ops.cross_entropy import linear_cross_entropy
from transnormer.ops.eos import eos
from transnormer.ops.linear_attention import (
    RingState,
    linear_attention,
    linear_attention_ring_step,
    linear_attention_step,
)

__all__ = [
    "RingState",
    "decay",
    "eos",
    "linear_attention",
    "linear_attention_ring_step",
    "linear_attention_step",
    "linear_cross_entropy",
]
