"""Weight-only quantisation for decoding, whose speed at small batches is that of reading weights."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.infer.gptq import calibrate
from transnormer.models.decoder import Decoder

# What torch's 4-bit tile kernels take: inputs in multiples, outputs in multiples, and their tiles.
_TILE_INPUTS, _TILE_OUTPUTS, _INNER_TILES = 1024, 8, 8


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
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise RuntimeError(
            "quantisation needs torchao; run: pip install 'transnormer[quant]'"
        ) from error
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


def _untyped(value: Any) -> Any:
    return value


def _install(module: nn.Linear, ints: Tensor, scales: Tensor) -> None:
    """Put 4-bit integers [outputs, inputs] and their scales in the place of a weight."""
    weight = _tiles(ints, scales) if ints.is_cuda else _bytes(ints, scales, module.weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)


def _bytes(ints: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """torchao's 4-bit weights of a byte each."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    size = ints.shape[1] // scales.shape[1]
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    target = _untyped(torch).int4
    return IntxUnpackedToInt8Tensor(ints, scales.to(dtype), zeros, target, (1, size), dtype, None)


def _tiles(ints: Tensor, scales: Tensor) -> Tensor:
    """torchao's packed 4-bit weights, (integer + 8 - 8) x scale + 0 in the kernels' convention."""
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    outputs, inputs = ints.shape
    size = inputs // scales.shape[1]
    more = (0, -inputs % _TILE_INPUTS, 0, -outputs % _TILE_OUTPUTS)
    unsigned = F.pad(ints.to(torch.int32), more) + 8
    pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
    more = (0, unsigned.shape[1] // size - scales.shape[1], 0, more[3])
    padded = F.pad(scales, more, value=1.0).bfloat16()
    both = pack_tinygemm_scales_and_zeros(padded, torch.zeros_like(padded), torch.bfloat16)
    return Int4TilePackedTo4dTensor(packed, both, [1, size], torch.Size((outputs, inputs)))
