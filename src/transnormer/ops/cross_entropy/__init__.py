"""Cross-entropy of a linear head without the full logits."""

import torch
from torch import Tensor

from transnormer.ops import checks

IGNORE_INDEX = -100

# A chunk is at most this share of all rows, so that its few temporaries stay under an eighth of the
# full logits; and at most so many elements: on a CPU what the cache holds, on a GPU what fills it.
_CHUNK_SHARE = 32
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def _chunk_rows(x: Tensor, weight: Tensor) -> int:
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(min(-(-x.shape[0] // _CHUNK_SHARE), elements // weight.shape[0]), 1)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.mT).to(checks.accumulation_dtype(x.dtype))


@torch.library.custom_op("transnormer::linear_cross_entropy", mutates_args=())
def _chunked(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, [rows]; ignored rows have loss 0."""
    dtype = checks.accumulation_dtype(x.dtype)
    losses, normalizers = x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)
    step = _chunk_rows(x, weight)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        logits, label = _logits(x[part], weight), labels[part, None]
        normalizers[part] = logits.logsumexp(1)
        chosen = logits.gather(1, label.clamp(min=0))[:, 0]
        losses[part] = (normalizers[part] - chosen).masked_fill(label[:, 0] == IGNORE_INDEX, 0.0)
    return losses, normalizers


@_chunked.register_fake
def _(x, weight, labels):
    dtype = checks.accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


@torch.library.custom_op("transnormer::linear_cross_entropy_backward", mutates_args=())
def _chunked_backward(
    grad: Tensor, x: Tensor, weight: Tensor, labels: Tensor, normalizers: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    # The sum over chunks is kept in the accumulation dtype, whatever the weight's.
    grad_weight = torch.zeros_like(weight, dtype=normalizers.dtype)
    grad = grad.masked_fill(labels == IGNORE_INDEX, 0.0)
    step = _chunk_rows(x, weight)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        delta = _logits(x[part], weight).sub_(normalizers[part, None]).exp_()
        rows = torch.arange(delta.shape[0], device=x.device)
        delta[rows, labels[part].clamp(min=0)] -= 1.0
        delta = (delta * grad[part, None]).to(x.dtype)
        grad_x[part] = delta @ weight
        grad_weight += delta.mT @ x[part]
    return grad_x, grad_weight.to(weight.dtype)


@_chunked_backward.register_fake
def _(grad, x, weight, labels, normalizers):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_losses, _):
    x, weight, labels, normalizers = ctx.saved_tensors
    grads = torch.ops.transnormer.linear_cross_entropy_backward(
        grad_losses, x, weight, labels, normalizers
    )
    return *grads, None


_chunked.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of softmax(x weight^T) against labels, one number a row, in nats.

    The logits are made a chunk of rows at a time, and again in the backward pass: at most an eighth
    of the full logits exists at once. Logits of bfloat16 and float16 inputs
    are products in that dtype; log-sum-exp and losses are float32 (float64 for float64 inputs).

    Args:
        x: hidden states, [rows, model_dim].
        weight: head, [vocab_size, model_dim].
        labels: int64 [rows]; -100 is ignored: its loss and gradient are 0.

    Returns:
        losses, [rows], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, or (CPU, eager) a label outside the vocabulary.
        TypeError: labels not int64.
    """
    checks.check_rank("x", x, "rows model_dim")
    dims = "vocab_size model_dim"
    checks.check_shape("weight", weight, (weight.shape[0], x.shape[1]), dims)
    checks.check_shape("labels", labels, x.shape[:1], "rows")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}; expected torch.int64")
    vocab_size = weight.shape[0]
    if checks.values_are_visible(labels):
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(
                f"labels holds {int(wrong[0])}; expected 0 to {vocab_size - 1}, or -100 to ignore"
            )
    x, weight = x.to(checks.autocast_dtype(x)), weight.to(checks.autocast_dtype(weight))
    return _chunked(x, weight, labels)[0]
