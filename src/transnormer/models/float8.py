"""Products of the blocks in float8, in training, by torchao; weights stay what they are."""

import dataclasses
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.models.decoder import Decoder
from transnormer.ops.checks import autocast_dtype

Float8 = Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"]

# What float8 tensor cores take sums over in one step: every side of a product is a multiple.
MULTIPLE = 16
# Ada and Hopper have them first.
_CAPABILITY = (8, 9)


def use_float8(model: nn.Module, recipe: Float8, device: torch.device) -> None:
    """Let the large projections of a model's blocks multiply in float8 while they train.

    A projection's three products, y = x W^T, dx = dy W and dW = dy^T x, take both factors rounded to
    8 bits by a scale, max(dtype) / max|factor|, of the values at hand. Sums are float32; on a GPU
    those of y have the fewer bits that the device's fast sums keep. y, dx and dW come out in the
    dtype of x. W, its gradient and the optimizer's states keep their dtypes and names, so that files
    are those of any other run. In eval mode products are plain ones: what is scored is what is
    exported.

    Recipes, by torchao's names:

    - "tensorwise": a scale a tensor; x and W are float8_e4m3fn, dy float8_e5m2.
    - "rowwise": a scale a row of each factor, along what the product sums over, rounded down to a
      power of two; all are float8_e4m3fn.
    - "rowwise_with_gw_hp": as "rowwise", but W has one scale in dx, and dW is no float8 product.

    What is converted: linear layers of blocks with at least half of the model's width on both sides.
    Embedding, head, norms, angles, decays, low-rank gates and what lies between projections stay. On
    a CPU the factors are rounded the same and multiplied in float32, which is slow and for tests.

    Source: Micikevicius et al. 2022, arXiv:2209.05433 (the formats); torchao's ``float8``.

    Args:
        model: on any device; changed in place, before it is compiled or laid out on ranks.
        recipe: "none" leaves it as it is.
        device: where it will train.

    Raises:
        ValueError: an unknown recipe; a projection whose sides are no multiples of 16; none at all.
        RuntimeError: torchao is not installed; a GPU without float8 products.
    """
    if recipe not in get_args(Float8):
        raise ValueError(f"float8 is {recipe!r}; expected one of {', '.join(get_args(Float8))}")
    if recipe == "none":
        return
    found = large_projections(model)
    for name, module in found.items():
        rows, columns = module.weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            raise ValueError(
                f"{name} has {columns} inputs and {rows} outputs; expected multiples of {MULTIPLE} "
                "for float8; change the model's sizes, or set train.float8 to 'none'"
            )
    if not found:
        raise ValueError(
            f"float8 is {recipe!r} and the model has no large projection in a block; expected one; "
            "set train.float8 to 'none'"
        )
    ao = _torchao()
    config = ao.Float8LinearConfig.from_recipe_name(recipe)
    if device.type == "cuda":
        _check_capability(torch.cuda.get_device_capability(device))
    else:
        config = dataclasses.replace(config, emulate=True)
    ao.convert_to_float8_training(
        model, module_filter_fn=lambda _, name: name in found, config=config
    )
    for name in found:
        module = model.get_submodule(name)
        module.__class__ = _trained(type(module))


def large_projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model's blocks that ``use_float8`` converts, by name."""
    found: dict[str, nn.Linear] = {}
    for outer, decoder in model.named_modules():
        if not isinstance(decoder, Decoder):
            continue
        least = decoder.config.model_dim / 2
        prefix = f"{outer}.blocks" if outer else "blocks"
        for name, module in decoder.blocks.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) and min(module.weight.shape) >= least:
                found[name] = module
    return found


class _InTraining(nn.Module):
    """What is put over torchao's layer: plain products in eval mode, autocast on any device."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        # torchao's layer asks for the GPU's autocast alone.
        return super().forward(input.to(autocast_dtype(input)))


@cache
def _trained(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"{layer.__name__}InTraining", (_InTraining, layer), {})


def _check_capability(capability: tuple[int, int]) -> None:
    if capability < _CAPABILITY:
        shown = ".".join(map(str, capability))
        raise RuntimeError(
            f"the GPU's compute capability is {shown}; expected at least 8.9 for float8 products; "
            "set train.float8 to 'none'"
        )


def _torchao() -> Any:
    try:
        from torchao import float8
    except ImportError as error:
        raise RuntimeError(
            "float8 products need torchao; run: pip install 'transnormer[quant]'"
        ) from error
    return float8
