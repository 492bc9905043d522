"""Weight-only quantisation for decoding, whose speed at small batches is that of reading weights."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.infer.gptq import calibrate
from transnormer.models.decoder import Decoder
from transnormer.models.quantized_weights import Rounded, install, read_by_rows, torchao

# Rows of the unit matrix at a time that read tile-packed weights.
_UNIT_VECTORS = 2048


def quantize(
    model: Decoder,
    bits: Literal[8, 4],
    *,
    group_size: int = 128,
    calibration: Iterable[Tensor] | None = None,
) -> None:
    """Replace the projections' weights by integers and scales, in place.

    Only the matrices inside the blocks: embedding and head, norms, decays and angles stay as they
    are, and so do activations, states and sums. 8 bits have a scale a row, 4 bits a scale for each
    group_size weights of a row. Integers are the nearest ones, or for 4 bits with ``calibration``
    those of GPTQ. On a GPU the 4-bit weights are packed for torch's tile kernels, which take
    bfloat16; on a CPU they take a byte each, so that results can be looked at, not memory saved.
    What was quantised on a CPU can be saved, and loaded on either (``models.quantized_weights``).

    Args:
        model: a decoder, not to be trained afterwards; its fingerprint changes.
        bits: 8 or 4.
        group_size: weights that share a scale, 4 bits only; divides the projections' inputs.
        calibration: ids [batch, seq] of texts like those to come, some ten thousand tokens; each is
            read once a block.

    Raises:
        ValueError: other bits, a group size that does not fit a projection (it is named), a model
            that is quantised already, no calibration texts, or some for 8 bits.
        TypeError: 4 bits on a GPU for a model that is not bfloat16, a group size that is no int.
        RuntimeError: torchao is not installed.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}; expected 8 or 4")
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size is {group_size!r}; expected an integer")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1")
    if bits == 8 and calibration is not None:
        raise ValueError("calibration is given; expected None for 8 bits, which rounding serves")
    targets = {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    for name, module in targets.items():
        if type(module.weight) is not nn.Parameter:
            kind = type(module.weight).__name__
            raise ValueError(
                f"{name}.weight is a {kind}; expected plain weights; load the model again"
            )
    on_gpu = next(model.parameters()).is_cuda
    if bits == 4:
        for name, module in targets.items():
            if module.in_features % group_size:
                raise ValueError(
                    f"group_size is {group_size}; expected a divisor of the {module.in_features} "
                    f"inputs of {name}"
                )
            if on_gpu and module.weight.dtype != torch.bfloat16:
                raise TypeError(f"{name} is {module.weight.dtype}; expected bfloat16 for 4 bits")
    ao = torchao()
    if calibration is not None:
        calibrate(model, targets, calibration, group_size, _install)
        return
    # Names that torch and torchao make at run time.
    types, packing = _untyped(torch), _untyped("tile_packed_to_4d")
    settings: Any
    if bits == 8:
        settings = ao.Int8WeightOnlyConfig(version=2)
    elif on_gpu:
        settings = ao.Int4WeightOnlyConfig(group_size=group_size, int4_packing_format=packing)
    else:
        settings = ao.IntxWeightOnlyConfig(
            weight_dtype=types.int4, granularity=ao.PerGroup(group_size)
        )
    ao.quantize_(model, settings, filter_fn=lambda module, name: name in targets)
    read_by_rows(model)


@torch.no_grad()
def four_bits(weight: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """The 4-bit integers of a projection's weight, whichever way torchao holds them.

    A tile-packed weight, which only its own product reads, is multiplied with the unit vectors: what
    comes out is the weight rounded to bfloat16, off by less than a 16th of a step.

    Args:
        weight: a parameter of a quantised model.

    Returns:
        ints int32 [outputs, inputs] from 0 to 15, scales and zeros [outputs, groups], for the weight
        (ints - 8) x scales + zeros; None for any other weight.
    """
    kind = type(weight).__name__
    if kind == "IntxUnpackedToInt8Tensor":
        if weight.target_dtype != _untyped(torch).int4 or bool(weight.zero_point.any()):
            return None
        scales = weight.scale
        return weight.qdata.to(torch.int32) + 8, scales, torch.zeros_like(scales)
    if kind != "Int4TilePackedTo4dTensor":
        return None
    outputs, inputs = weight.shape
    groups = inputs // weight.block_size[-1]
    both = weight.scale_and_zero[:groups, :outputs]
    scales, zeros = (both[..., i].T.contiguous() for i in range(2))
    size, ints = inputs // groups, []
    for start in range(0, inputs, _UNIT_VECTORS):
        rows = min(_UNIT_VECTORS, inputs - start)
        unit = torch.zeros(rows, inputs, dtype=torch.bfloat16, device=weight.device)
        unit[:, start:].fill_diagonal_(1.0)
        whole = F.linear(unit, weight).float().T
        at = torch.arange(start, start + rows, device=weight.device) // size
        steps = scales.float()[:, at].clamp(min=torch.finfo(torch.float32).tiny)
        ints.append(
            ((whole - zeros.float()[:, at]) / steps).round().clamp(-8, 7).to(torch.int32) + 8
        )
    return torch.cat(ints, 1), scales, zeros


def _untyped(value: Any) -> Any:
    return value


def _install(module: nn.Linear, ints: Tensor, scales: Tensor) -> None:
    """Put 4-bit integers [outputs, inputs] and their scales in the place of a weight."""
    install(module, Rounded(ints, scales, 4))
