"""What a model needs at least of a device: memory to train and to serve, and the time of a token.

Bounds, not predictions: a device that moves every byte at its full bandwidth and multiplies at its
full rate would need this much, and none does. They follow from ``ModelCost`` and ``device_peaks``.
"""

from collections.abc import Sequence

import torch

from transnormer.models.cost import ModelCost
from transnormer.models.decoder import DecoderConfig
from transnormer.models.device_peaks import Peak

# Bytes a parameter: weight, gradient and AdamW's two moments, in float32 or all in bfloat16.
TRAINING_BYTES = {"float32": 16, "bfloat16": 8}
# Sequences that decode together.
ROWS = (1, 32, 256)


def training_bytes(parameters: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's moments, by their dtype; activations come on top.

    "float32" is 16 a parameter, also under bfloat16 autocast; "bfloat16" is 8: ``train.weights`` and
    ``optimizer.states`` in bfloat16. Between them, bfloat16 weights beside float32 states are 14, with
    the 2 that the optimizer keeps of what they round away.
    """
    return {name: each * parameters for name, each in TRAINING_BYTES.items()}


def serving_bytes(config: DecoderConfig, context: int) -> dict[str, int]:
    """Bytes of all weights and the state of one sequence after ``context`` tokens, by the weights'
    dtype; each further sequence adds its state."""
    costs = {name: ModelCost.of(config, getattr(torch, name)) for name in TRAINING_BYTES}
    return {name: cost.stored_bytes + cost.state_bytes(context) for name, cost in costs.items()}


def decode_bounds(
    cost: ModelCost, peak: Peak, precision: str, context: int, rows: Sequence[int] = ROWS
) -> dict[int, float]:
    """Most tokens a second in all, by the number of sequences that decode together.

    A step moves ``ModelCost.decode_bytes`` and computes the forward pass of a token a row; it lasts
    at least as long as the slower of the two.

    Args:
        cost: of the model, in the dtype that it is served in.
        peak: of the device.
        precision: of the products, "bfloat16" or "float32".
        context: tokens behind and including the one that is counted.
        rows: numbers of sequences.
    """
    flops = cost.flops(context).total
    return {
        n: n
        / max(cost.decode_bytes(n, context) / peak.bandwidth, n * flops / peak.flops(precision))
        for n in rows
    }


def prefill_bound(cost: ModelCost, peak: Peak, precision: str, context: int) -> float:
    """Most tokens a second of a prompt of ``context`` tokens: products of the blocks at the peak.

    The head reads the last token alone and is left out.
    """
    return peak.flops(precision) / cost.flops((context + 1) // 2).blocks


def training_bound(cost: ModelCost, peak: Peak, precision: str, context: int) -> float:
    """Most tokens a second of training on sequences of ``context`` tokens: three times the forward
    pass's products at the peak, which is an MFU of 1."""
    return peak.flops(precision) / (3.0 * cost.flops((context + 1) // 2).total)
