"""Cross-entropy of rows of logits, and its gradient in their place, in Triton.

    loss_r = log(sum over c of exp(z_r[c])) - z_r[label_r]
    d loss_r / d z_r[c] = exp(z_r[c]) / (sum over c of exp(z_r[c])) - (c == label_r)

z [rows, vocab_size] is overwritten with the gradient, so that both never exist at once (Hsu et al.
2024, arXiv:2410.10989, Liger Kernel, section 3.2). Sums and exponentials are float32. A row of 16-bit
logits that the registers of a program hold is read once. Others are read twice: all rows under way
together are more than the cache holds, so the second time is from memory too.

Legend: V vocabulary, C columns of a block, N a power of two that holds V.
"""

import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import device_of, launch

_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
# Columns that 512 threads read at once in rows of 16 bytes each.
_COLUMNS = 4096
_WARPS = 16
# Columns that the registers of 512 threads hold beside what they compute with: 64 of 128 registers.
_MOST_COLUMNS = 65_536
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def add_block(z, peaks, sums):
    """Running peak and sum of exp(z - peak) of each column of the blocks.

    One peak for all columns would be a maximum over the whole program at every block.
    """
    higher = tl.maximum(peaks, z)
    return higher, sums * tl.exp(peaks - higher) + tl.exp(z - higher)


@triton.jit
def gradient_of(z, normalizer, at, label):
    """softmax - label, over the columns ``at``."""
    return tl.exp(z - normalizer) - (at == label).to(tl.float32)


@triton.jit(do_not_specialize=["V"])
def softmax_kernel(
    logits, labels, losses, stride, V, IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Loss of one row, and (WITH_GRADIENT) its gradient over the logits.

    Full blocks have no masks, whose bound would break up reads of 16 bytes. A label outside the
    vocabulary gives NaN: nothing is read there.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    columns = tl.arange(0, C)
    full = V // C * C
    live = full + columns < V
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            zeros = tl.zeros([C], dtype=logits.dtype.element_ty)
            for start in range(0, full, C):
                tl.store(logits + start + columns, zeros)
            tl.store(logits + full + columns, zeros, mask=live)
        return
    inside = (label >= 0) & (label < V)
    chosen = tl.load(logits + label, mask=inside, other=float("nan")).to(tl.float32)
    peaks = tl.full([C], _LOWEST, dtype=tl.float32)
    sums = tl.zeros([C], dtype=tl.float32)
    for start in range(0, full, C):
        z = tl.load(logits + start + columns).to(tl.float32)
        peaks, sums = add_block(z, peaks, sums)
    last = tl.load(logits + full + columns, mask=live, other=float("-inf")).to(tl.float32)
    peaks, sums = add_block(last, peaks, sums)
    peak = tl.max(peaks, 0)
    normalizer = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))
    tl.store(losses + row, normalizer - chosen)
    if WITH_GRADIENT:
        for start in range(0, full, C):
            z = tl.load(logits + start + columns).to(tl.float32)
            gradient = gradient_of(z, normalizer, start + columns, label)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty))
        gradient = gradient_of(last, normalizer, full + columns, label)
        tl.store(logits + full + columns, gradient.to(logits.dtype.element_ty), mask=live)


@triton.jit
def row_kernel(
    logits, labels, losses, stride, V, IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """As ``softmax_kernel``, with the row in registers from the one time that it is read.

    It stays in 16 bits there; V is a multiple of 16, so that masks do not break up its reads. A tile
    of rows is many times what the cache holds: what is left there of rows that are done only delays
    the others (measured: an eighth of the time).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    at = tl.arange(0, N)
    live = at < V
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            tl.store(logits + at, tl.zeros([N], dtype=logits.dtype.element_ty), mask=live)
        return
    inside = (label >= 0) & (label < V)
    z = tl.load(
        logits + at, mask=live, other=float("-inf"), eviction_policy="evict_first"
    )  # fmt: skip
    chosen = tl.load(logits + label, mask=inside, other=float("nan")).to(tl.float32)
    peak = tl.max(z.to(tl.float32), 0)
    powers = tl.exp2(z.to(tl.float32) * _LOG2_E - peak * _LOG2_E)
    normalizer = peak + tl.log(tl.sum(powers, 0))
    tl.store(losses + row, normalizer - chosen)
    if WITH_GRADIENT:
        gradient = tl.exp2(z.to(tl.float32) * _LOG2_E - normalizer * _LOG2_E)
        gradient = gradient.to(logits.dtype.element_ty)
        tl.store(logits + at, gradient, mask=live, eviction_policy="evict_first")
        # One number a row: a comparison of every column would be a third of the arithmetic.
        tl.debug_barrier()
        own = tl.exp2((chosen - normalizer) * _LOG2_E) - 1.0
        tl.store(logits + label, own.to(logits.dtype.element_ty), mask=inside)


def losses_in_place(
    logits: Tensor, labels: Tensor, losses: Tensor, *, ignored: int, with_gradient: bool
) -> None:
    """Fill ``losses`` [rows], float32, from logits [rows, vocab_size] with a contiguous last dim.

    With gradient the logits become the gradient of each row's loss; rows whose label is
    ``ignored`` have loss and gradient 0.
    """
    rows, vocab_size = logits.shape
    columns = triton.next_power_of_2(vocab_size)
    fits = logits.element_size() == 2 and vocab_size % 16 == 0 and columns <= _MOST_COLUMNS
    with device_of(logits):
        if fits:
            launch(
                row_kernel, rows, logits, labels, losses, logits.stride(0), vocab_size,
                IGNORED=ignored, WITH_GRADIENT=with_gradient, N=columns,
                num_warps=min(max(columns // 2048, 1), _WARPS),
            )  # fmt: skip
            return
        launch(
            softmax_kernel, rows, logits, labels, losses, logits.stride(0), vocab_size,
            IGNORED=ignored, WITH_GRADIENT=with_gradient,
            C=min(columns, _COLUMNS), num_warps=_WARPS,
        )  # fmt: skip
