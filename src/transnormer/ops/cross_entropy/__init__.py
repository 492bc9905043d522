"""Cross-entropy of a linear head without the full logits."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.cross_entropy.fused import IGNORE_INDEX, fused_sum
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_devices import why_not_named

# A tile of logits, rows x vocabulary entries, is at most this share of all of them, so that its few
# temporaries stay under an eighth; and at most so many elements: on a CPU about what the cache
# holds, on a GPU what fills it. It takes many rows, since each tile reads its part of the head once.
_TILE_SHARE = 64
_TILE_ROWS = 4096
# Narrower tiles waste the matrix product; a vocabulary so small has small logits anyway.
_TILE_WIDTH = 256
_TILE_ELEMENTS = {"cpu": 1 << 20}
_TILE_ELEMENTS_ELSEWHERE = 1 << 26


def _tile(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile."""
    elements = _TILE_ELEMENTS.get(x.device.type, _TILE_ELEMENTS_ELSEWHERE)
    rows = max(min(x.shape[0], _TILE_ROWS), 1)
    # Of many rows a tile has few, and may be wider: on a GPU each tile costs a dozen launches.
    share = -(-x.shape[0] * weight.shape[0] // _TILE_SHARE)
    width = max(-(-share // rows), _TILE_WIDTH)
    return rows, max(min(elements // rows, width), 1)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.mT).to(checks.accumulation_dtype(x.dtype))


def _inside(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in a tile's part of the vocabulary, and their columns, [rows, 1] each."""
    columns = labels[:, None] - start
    return (columns >= 0) & (columns < width), columns.clamp(0, width - 1)


@torch.library.custom_op("transnormer::linear_cross_entropy", mutates_args=())
def _tiled(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, [rows]; ignored rows have loss 0."""
    dtype = checks.accumulation_dtype(x.dtype)
    chosen = x.new_zeros(x.shape[0], 1, dtype=dtype)
    normalizers = x.new_full((x.shape[0],), -torch.inf, dtype=dtype)
    rows, width = _tile(x, weight)
    with checks.no_autocast(x.device.type):
        for first in range(0, x.shape[0], rows):
            part = slice(first, first + rows)
            for start in range(0, weight.shape[0], width):
                logits = _logits(x[part], weight[start : start + width])
                inside, columns = _inside(labels[part], start, logits.shape[1])
                chosen[part] += torch.where(inside, logits.gather(1, columns), 0.0)
                normalizers[part] = torch.logaddexp(normalizers[part], logits.logsumexp(1))
    return (normalizers - chosen[:, 0]).masked_fill(labels == IGNORE_INDEX, 0.0), normalizers


@_tiled.register_fake
def _(x, weight, labels):
    dtype = checks.accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


@torch.library.custom_op("transnormer::linear_cross_entropy_backward", mutates_args=())
def _tiled_backward(
    grad: Tensor, x: Tensor, weight: Tensor, labels: Tensor, normalizers: Tensor
) -> tuple[Tensor, Tensor]:
    # Sums over tiles are kept in the accumulation dtype; rows that fit one tile have no such sum.
    grad_x = torch.zeros_like(x, dtype=normalizers.dtype)
    grad = grad.masked_fill(labels == IGNORE_INDEX, 0.0)[:, None]
    rows, width = _tile(x, weight)
    one_tile = rows >= x.shape[0]
    grad_weight = torch.zeros_like(weight, dtype=weight.dtype if one_tile else normalizers.dtype)
    with checks.no_autocast(x.device.type):
        for first in range(0, x.shape[0], rows):
            part = slice(first, first + rows)
            for start in range(0, weight.shape[0], width):
                columns = slice(start, start + width)
                delta = _logits(x[part], weight[columns]).sub_(normalizers[part, None]).exp_()
                inside, label = _inside(labels[part], start, delta.shape[1])
                delta.scatter_add_(1, label, -inside.to(delta.dtype))
                delta = (delta * grad[part]).to(x.dtype)
                grad_x[part] += delta @ weight[columns]
                grad_weight[columns] += delta.mT @ x[part]
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@_tiled_backward.register_fake
def _(grad, x, weight, labels, normalizers):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_losses, _):
    x, weight, labels, normalizers = ctx.saved_tensors
    grads = torch.ops.transnormer.linear_cross_entropy_backward(
        grad_losses, x, weight, labels, normalizers
    )
    return *grads, None


_tiled.register_autograd(_backward, setup_context=_setup_context)


class Request(NamedTuple):
    """The facts of a call that decide which implementations can run it."""

    device: torch.device
    dtype: torch.dtype
    reduction: str
    named: bool


def _needs_triton(request: Request) -> Exception | None:
    reason = why_not_named(request.device, request.named)
    if reason is not None:
        return RuntimeError(f"implementation 'triton': {reason}, or use 'auto' or 'tiled'")
    if request.dtype == torch.float64:
        what, expected = "x is torch.float64", "float32, bfloat16 or float16"
    elif request.reduction != "sum":
        what, expected = f"reduction is {request.reduction!r}", "'sum'"
    else:
        return None
    return NotImplementedError(
        f"implementation 'triton': {what}; expected {expected}; use 'auto' or 'tiled'"
    )


def _run_tiled(x: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    losses = _tiled(x, weight, labels)[0]
    return losses if reduction == "none" else losses.sum()


def _run_fused(x: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return fused_sum(x, weight, labels, wanted)[0]


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", _needs_triton, _run_fused),
    Implementation("tiled", lambda _: None, _run_tiled),
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["none", "sum"] = "none",
    implementation: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(x weight^T) against labels, in nats.

    The logits are made a tile at a time: beside the gradients at most an eighth of the full logits
    exists at once. Logits of bfloat16 and float16 inputs are products in that dtype; log-sum-exp
    and losses are float32 (float64 for float64 inputs).

    "tiled" is plain PyTorch and makes the logits again in the backward pass. "triton", for sums
    alone, forms the gradients beside the losses: the head's is summed over tiles in float32. Second
    derivatives are refused.

    Args:
        x: hidden states, [rows, model_dim].
        weight: head, [vocab_size, model_dim].
        labels: int64 [rows]; -100 is ignored: its loss and gradient are 0.
        reduction: "none" is one number a row, "sum" their sum, in which a GPU is faster.
        implementation: "auto", "triton" or "tiled".

    Returns:
        losses, [rows] or [], float32 (float64 for float64 inputs). On a GPU the loss of a label
        outside the vocabulary means nothing ("triton": it is NaN).

    Raises:
        ValueError: shapes, an unknown reduction or implementation, or (CPU, eager) a label outside
            the vocabulary.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    for name, tensor in (("x", x), ("weight", weight), ("labels", labels)):
        checks.check_tensor(name, tensor)
    checks.check_rank("x", x, "rows model_dim")
    checks.check_float("x", x)
    dims = "vocab_size model_dim"
    checks.check_rank("weight", weight, dims)
    checks.check_shape("weight", weight, (weight.shape[0], x.shape[1]), dims)
    checks.check_shape("labels", labels, x.shape[:1], "rows")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}; expected torch.int64")
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'none' or 'sum'")
    vocab_size = weight.shape[0]
    if checks.values_are_visible(labels):
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(
                f"labels holds {int(wrong[0])}; expected 0 to {vocab_size - 1}, or -100 to ignore"
            )
    x, weight = x.to(checks.autocast_dtype(x)), weight.to(checks.autocast_dtype(weight))
    checks.check_same("weight", weight, x.dtype, x.device, "x")
    request = Request(x.device, x.dtype, reduction, named=implementation == "triton")
    row: Any = choose("linear_cross_entropy", IMPLEMENTATIONS, request, implementation)
    return row.run(x, weight, labels, reduction)
