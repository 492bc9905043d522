"""Gates of recurrent layers: from a projection to the log decays and keys of linear attention."""

from transnormer.ops.gates.cumulative_softmax import cumulative_softmax
from transnormer.ops.gates.forget_gate import forget_gate

__all__ = ["cumulative_softmax", "forget_gate"]
