"""What the decode kernels share: activations by number, the end of a row's product, and the order of
overlapping launches."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from transnormer.ops.decode import ACTIVATIONS
from transnormer.ops.linear_attention.triton_runtime import device_of

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def number_of(activation: str) -> int:
    """The number by which kernels know an activation."""
    return _NUMBERS[activation]


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """act(x) in float32, by its number."""
    if ACTIVATION == 1:
        x = x / (1.0 + tl.exp(-x))
    if ACTIVATION == 2:
        x = 1.0 / (1.0 + tl.exp(-x))
    if ACTIVATION == 3:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Let the next kernel begin before this one ends; it waits in ``wait_for_inputs``."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until every kernel before this one has ended and what it wrote is there.

    Before it a kernel reads only what no kernel of the step writes: weights, and states, which a
    step touches once.
    """
    if OVERLAP:
        gdc_wait()


@triton.jit
def finish_row(
    out, up, square, rows, residual, y, eps, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store entries of a row from its products: normed, multiplied or added to.

    Rounded where the products of the model in PyTorch are.
    """
    factor = 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(square / K + eps)
    out = (out * factor).to(y.dtype.element_ty).to(tl.float32)
    if DOUBLE:
        up = (up * factor).to(y.dtype.element_ty).to(tl.float32)
        out = activated(out, ACTIVATION).to(y.dtype.element_ty).to(tl.float32) * up
    if ADD:
        out += tl.load(residual + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < N)


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def run(
    kernel: Any, programs: int, x: Tensor, *arguments: Any, overlap: bool, **constants: Any
) -> None:
    """Launch on x's device; ``overlap`` lets the kernel begin before those ahead of it have ended,
    which GPUs of compute capability 9.0 and later can."""
    options = {"launch_pdl": True} if overlap and _overlaps(x.device) else {}
    with device_of(x):
        kernel[(programs,)](*arguments, OVERLAP=bool(options), **constants, **options)
