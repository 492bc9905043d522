"""Weights of integers and scales: as torchao's tensors in a model, and as plain tensors in files.

In a file a weight NAME is ``NAME.qdata``, int8 [outputs, inputs], or ``NAME.packed``, uint8
[outputs, inputs / 2] with two 4-bit integers a byte (the even column in its lower half, two's
complement), beside ``NAME.scale``, [outputs, groups]; the weight is integer x scale of its group.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.models.tensor_files import StoredTensor
from transnormer.ops import few_rows

_BYTES, _PACKED, _SCALE = ".qdata", ".packed", ".scale"
# What torch's 4-bit tile kernels take: inputs in multiples, outputs in multiples, and their tiles.
_TILE_INPUTS, _TILE_OUTPUTS, _INNER_TILES = 1024, 8, 8
# Rows up to which reading int8 weights is most of the work of a product on a CPU.
_FEW = 16
_BY_ROWS = (torch.float32, torch.bfloat16, torch.float16)


class Rounded(NamedTuple):
    """A weight of integers.

    Attributes:
        ints: int8 [outputs, inputs].
        scales: [outputs, groups]; one group for 8 bits.
        bits: 8 or 4.
    """

    ints: Tensor
    scales: Tensor
    bits: int


class ByRowsLinear(nn.Linear):
    """A projection whose weight is int8 with a scale a row: few rows on a CPU read it as it is.

    torchao multiplies by a copy of the whole weight in the inputs' dtype, which costs a decoding
    step more than the products. Sums are float32 or exact (``ops.few_rows``), scales come in at the
    end. Where a gradient is needed, and for many rows, torchao's way is left.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        rows = input.numel() // self.in_features
        on_cpu = input.device.type == "cpu" and rows <= _FEW and input.dtype in _BY_ROWS
        if not on_cpu or (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, weight, self.bias)
        x, compiling = input.reshape(rows, self.in_features), torch.compiler.is_compiling()
        # A compiler cannot follow numbers that are read from a tensor.
        if few_rows.reads_integers(self.in_features) and not compiling:
            y = few_rows.int8_product(x, weight.qdata, weight.scale)
        elif self.in_features % 32 == 0:
            scales = weight.scale.to(input.dtype).flatten()
            y = torch.ops.aten._weight_int8pack_mm(x, weight.qdata, scales)
        else:
            # The kernel of torch 2.13 leaves out inputs beyond the last 32 in bfloat16.
            return F.linear(input, weight, self.bias)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def read_by_rows(model: nn.Module) -> None:
    """Make every projection of a model whose weight is int8 with a scale a row a ``ByRowsLinear``."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and type(module.weight).__name__ == "Int8Tensor":
                with torch.device("meta"):
                    bias = module.bias is not None
                    made = ByRowsLinear(module.in_features, module.out_features, bias=bias)
                made.weight, made.bias = module.weight, module.bias
                setattr(parent, name, made.train(module.training))


def plain_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model as files hold them: quantised ones as their integers and scales.

    Raises:
        NotImplementedError: a tensor that is no plain one and none that ``quantize`` makes on a CPU.
    """
    parts: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if type(x) in (Tensor, nn.Parameter):
            parts[name] = x
            continue
        weight: Any = x
        ints, zeros = getattr(weight, "qdata", None), getattr(weight, "zero_point", None)
        kind = {"Int8Tensor": 8, "IntxUnpackedToInt8Tensor": 4}.get(type(x).__name__)
        if kind is None or ints is None or (zeros is not None and bool(zeros.any())):
            raise NotImplementedError(
                f"{name} is a {type(x).__name__}; expected a plain tensor, or integers and scales as "
                "quantize makes them on a CPU; quantise there, save, and load the files on a GPU"
            )
        parts[name + _SCALE] = weight.scale
        if kind == 8:
            parts[name + _BYTES] = ints
        else:
            halves = ints.to(torch.uint8) & 15
            parts[name + _PACKED] = halves[:, ::2] | halves[:, 1::2] << 4
    return parts


def split(
    stored: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, Rounded]]:
    """Stored tensors with every weight whole in the model's dtype, and those that are of integers.

    Raises:
        ValueError: integers without scales, or of another shape than these have; they are named.
    """
    plain, found = {}, {}
    dtypes = [x.tensor.dtype for name, x in stored.items() if name.endswith("embedding.weight")]
    for name, x in stored.items():
        base, dot, suffix = name.rpartition(".")
        if dot + suffix == _SCALE and {base + _BYTES, base + _PACKED} & stored.keys():
            continue
        if dot + suffix not in (_BYTES, _PACKED):
            plain[name] = x
            continue
        scale = stored.get(base + _SCALE)
        if scale is None:
            raise ValueError(f"{x.file} holds {name}; expected {base}{_SCALE} beside it")
        rounded = _unpacked(x.tensor, scale.tensor, dot + suffix == _PACKED)
        if rounded is None or not dtypes:
            raise ValueError(
                f"{x.file}: {name} has shape {list(x.tensor.shape)} and {base}{_SCALE} "
                f"{list(scale.tensor.shape)}; expected the same rows, and groups of one size"
            )
        found[base] = rounded
        size = rounded.ints.shape[1] // rounded.scales.shape[1]
        whole = rounded.ints * rounded.scales.float().repeat_interleave(size, 1)
        plain[base] = StoredTensor(whole.to(dtypes[0]), x.file)
    return plain, found


def _unpacked(values: Tensor, scales: Tensor, packed: bool) -> Rounded | None:
    """Integers and scales as they belong together, or None where they do not."""
    if values.dim() != 2 or scales.dim() != 2 or values.shape[0] != scales.shape[0]:
        return None
    if values.dtype != (torch.uint8 if packed else torch.int8) or not scales.is_floating_point():
        return None
    if packed:
        halves = torch.stack([values & 15, values >> 4], -1).flatten(1).to(torch.int8)
        values = torch.where(halves > 7, halves - 16, halves)
    groups = scales.shape[1]
    if groups < 1 or values.shape[1] % groups or (not packed and groups != 1):
        return None
    return Rounded(values, scales, 4 if packed else 8)


def install(module: nn.Linear, rounded: Rounded) -> None:
    """Put integers and scales in the place of a projection's weight, on its device.

    On a GPU 4-bit weights are packed for torch's tile kernels; on a CPU they take a byte each.

    Raises:
        TypeError: 4 bits on a GPU for a weight that is not bfloat16.
        RuntimeError: torchao is not installed.
    """
    old = module.weight
    ints, scales = rounded.ints.to(old.device), rounded.scales.to(old.device)
    torchao()
    if rounded.bits == 8:
        weight = _bytes8(ints, scales, old.dtype)
    elif old.is_cuda:
        if old.dtype != torch.bfloat16:
            raise TypeError(f"the weight is {old.dtype}; expected bfloat16 for 4 bits on a GPU")
        weight = _tiles(ints, scales)
    else:
        weight = _bytes4(ints, scales, old.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)


def install_all(model: nn.Module, found: Mapping[str, Rounded]) -> None:
    """``install`` each weight by its name."""
    for name, rounded in found.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, nn.Linear)
        install(module, rounded)
    read_by_rows(model)


def torchao() -> Any:
    """torchao.quantization; raises RuntimeError where it is not installed."""
    try:
        from torchao import quantization
    except ImportError as error:
        raise RuntimeError(
            "quantised weights need torchao; run: pip install 'transnormer[quant]'"
        ) from error
    return quantization


def _bytes8(ints: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor

    zeros = torch.zeros_like(scales, dtype=torch.int8)
    return Int8Tensor(ints, scales, [1, ints.shape[1]], dtype, zeros)


def _bytes4(ints: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """torchao's 4-bit weights of a byte each."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    size = ints.shape[1] // scales.shape[1]
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    # A name that torch makes at run time.
    target: Any = getattr(torch, "int4")  # noqa: B009
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
