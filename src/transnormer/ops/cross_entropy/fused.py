"""The sum of a linear head's cross-entropy with its gradients in one pass, by kernels.

Where the sum is what is wanted, each row's loss has the same gradient, so the gradients of x and of
the head are formed beside the losses, up to that number: the logits of a tile of rows are made
once, become their own gradient in place, and are multiplied with the head and with x. That saves
the product that makes them again in a backward pass of its own.
"""

import torch
from torch import Tensor

from transnormer.ops import checks

IGNORE_INDEX = -100
# A tile of rows has at most this share of all logits, and at most so many of them.
TILE_SHARE = 8
_TILE_LOGITS = 1 << 29
# Rows of logits begin at multiples of so many: products read them 16 bytes at a time.
_ALIGNMENT = 64


def _rows_of_a_tile(rows: int, vocab_size: int) -> int:
    share = -(-rows // TILE_SHARE)
    return max(min(share, _TILE_LOGITS // vocab_size), 1)


def _put_product(total: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """total = a b, or total += a b, in total's dtype, float32: of 16-bit inputs it is not rounded."""
    if a.is_cuda and a.dtype != total.dtype:
        if add:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=float(add))


@torch.library.custom_op("transnormer::linear_cross_entropy_sum", mutates_args=())
def fused_sum(
    x: Tensor, weight: Tensor, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, float32, and its gradients of x (its dtype) and weight (float32).

    Without gradient the last two are empty.
    """
    from transnormer.ops.cross_entropy.triton_softmax import losses_in_place

    labels = labels.contiguous()
    rows, vocab_size = x.shape[0], weight.shape[0]
    losses = x.new_empty(rows, dtype=torch.float32)
    grad_x = torch.empty_like(x) if with_gradient else x.new_empty(0)
    # The first tile writes it, the others add to it.
    make = weight.new_empty if rows else weight.new_zeros
    grad_weight = make(weight.shape if with_gradient else (0,), dtype=torch.float32)
    tile = _rows_of_a_tile(rows, vocab_size)
    width = -(-vocab_size // _ALIGNMENT) * _ALIGNMENT
    buffer = x.new_empty(min(tile, rows), width)
    with checks.no_autocast(x.device.type):
        for first in range(0, rows, tile):
            part = x[first : first + tile]
            logits = buffer[: part.shape[0], :vocab_size]
            torch.mm(part, weight.mT, out=logits)
            losses_in_place(
                logits,
                labels[first : first + tile],
                losses[first : first + tile],
                ignored=IGNORE_INDEX,
                with_gradient=with_gradient,
            )
            if with_gradient:
                torch.mm(logits, weight, out=grad_x[first : first + tile])
                _put_product(grad_weight, logits.mT, part, add=first > 0)
    return losses.sum(), grad_x, grad_weight


@fused_sum.register_fake
def _(x, weight, labels, with_gradient):
    grad_x = x.new_empty(x.shape if with_gradient else (0,))
    grad_weight = weight.new_empty(weight.shape if with_gradient else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), grad_x, grad_weight


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_sum, *grads_of_gradients):
    if any(grad is not None for grad in grads_of_gradients):
        # Without this, torch takes the second derivative for 0.
        raise NotImplementedError(
            "the sum of linear_cross_entropy has no second derivative; take logits and "
            "torch.nn.functional.cross_entropy"
        )
    if grad_sum is None:
        return None, None, None, None
    grad_x, grad_weight = ctx.saved_tensors
    return grad_x * grad_sum, (grad_weight * grad_sum).to(ctx.dtype), None, None


fused_sum.register_autograd(_backward, setup_context=_setup_context)
