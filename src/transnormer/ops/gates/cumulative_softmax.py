"""Keys that are a softmax over the tokens so far, and the log decays that keep it one (LightNet)."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_ops import Form, Request, needs_triton
from transnormer.ops.logcumsumexp import logcumsumexp


def _fake(x, log_mass, mask, cu_seqlens, key_dim, copies):
    log_decay = x.new_empty(*x.shape[:2], copies * x.shape[2], dtype=torch.float32)
    return log_decay, x.new_empty(x.shape), log_mass.new_empty(log_mass.shape)


def _fake_backward(d_log, d_keys, d_end, log_decay, log_mass, cu_seqlens, key_dim, copies):
    return d_keys.new_empty(d_keys.shape), log_mass.new_empty(log_mass.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, log_mass, _, cu_seqlens, *ctx.form = inputs
    ctx.save_for_backward(output[0], log_mass, cu_seqlens)


def _gradients(ctx, d_log, d_keys, d_end):
    dx, d_start = _backward_op(d_log, d_keys, d_end, *ctx.saved_tensors, *ctx.form)
    return dx, d_start, None, None, None, None


_op, _backward_op = kernel_ops.define(
    "cumulative_softmax",
    "transnormer.ops.gates.triton_cumulative_softmax",
    Form(
        "(Tensor x, Tensor log_mass, Tensor? mask, Tensor? cu_seqlens, SymInt key_dim, int copies) "
        "-> (Tensor, Tensor, Tensor)",
        _fake,
    ),
    Form(
        "(Tensor d_log, Tensor d_keys, Tensor d_end, Tensor log_decay, Tensor log_mass, "
        "Tensor? cu_seqlens, SymInt key_dim, int copies) -> (Tensor, Tensor)",
        _fake_backward,
    ),
    _setup_context,
    _gradients,
)


def _run_triton(
    logits: Tensor,
    log_mass: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_dim = logits.shape[2:]
    results = _op(logits.flatten(2), log_mass.flatten(1), mask, cu_seqlens, key_dim, copies)
    log_decay = results[0].unflatten(2, (heads, copies * key_dim))
    return log_decay, results[1].view(logits.shape), results[2].view(log_mass.shape)


def sequences_of(cu_seqlens: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    """Bounds as int64, and the packed sequence that each token lies in, [seq]."""
    bounds = cu_seqlens.to(torch.int64)
    token = torch.arange(seq, device=bounds.device)
    return bounds, torch.searchsorted(bounds[1:], token, right=True)


def _log_mass(logits: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log mass before each token, shaped as logits, and after the last one, shaped as start.

    The mass at the start is a token of its own in front of each sequence, so that empty sequences
    and gradients of the state need no case.
    """
    if cu_seqlens is None:
        z = logcumsumexp(torch.cat([start[:, None], logits], 1))
        return z[:, :-1], z[:, -1]
    seq, rows = logits.shape[1], start.shape[0]
    bounds, sequence = sequences_of(cu_seqlens, seq)
    every = torch.arange(seq + rows, device=bounds.device)
    place, row = every[:seq] + sequence + 1, every[:rows]
    first, last = bounds[:-1] + row, bounds[1:] + row
    # Where the token at each place comes from: a permutation.
    source = torch.zeros_like(every).scatter(0, torch.cat([place, first]), every)
    begins = torch.zeros_like(source).scatter(0, first, 1).bool()
    z = logcumsumexp(torch.cat([logits, start[None]], 1).index_select(1, source), begins)
    return z.index_select(1, place - 1), z.index_select(1, last)[0]


def _run_torch(
    logits: Tensor,
    log_mass: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(checks.accumulation_dtype(logits.dtype))
    if mask is not None:
        x = x.masked_fill(~mask[..., None, None], -math.inf)
    before, log_mass = _log_mass(x, log_mass, cu_seqlens)
    # z_{t-1} - z_t and k_t - z_t without cancellation. At the first token this is +inf: the decay
    # is 0 and the key 1. A token without mass is none, also where there is none before it.
    none = x == -math.inf
    difference = torch.where(none, -math.inf, torch.where(none, 0.0, x) - before)
    log_decay = F.logsigmoid(-difference)
    if copies > 1:
        log_decay = torch.cat([log_decay] * copies, -1)
    return log_decay, torch.sigmoid(difference).to(logits.dtype), log_mass


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", needs_triton, _run_triton),
    Implementation("torch", lambda _: None, _run_torch),
)


def cumulative_softmax(
    logits: Tensor,
    log_mass: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    copies: Literal[1, 2] = 1,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of a linear attention whose weights are a softmax over the tokens so far.

    Per channel, with z_t = log(exp(z_0) + sum_{s <= t} exp(logits_s)):
    log_decay_t = z_{t-1} - z_t and key_t = exp(logits_t - z_t), so that after every token the
    weights of the tokens and of the initial mass sum to 1 (Qin et al. 2024, arXiv:2405.21022,
    section 3). No range of logits overflows; the first token after no mass has log_decay -inf and
    key 1; a masked token, and a logit of -inf, has log_decay 0 and key 0 and leaves no trace.

    Computed in float32 (float64 for float64 logits). "torch" sums in float64, in a number of steps
    that grows with sqrt(seq); "triton" takes at most four launches whatever the length, and keeps
    log_decay alone for the backward pass.

    Args:
        logits: [batch, seq, heads, key_dim], below infinity.
        log_mass: z_0, [batch or num_sequences, heads, key_dim], float32 (float64 for float64
            logits); -inf is no mass, whose gradient is 0.
        mask: bool [batch, seq], False at tokens that do not count.
        cu_seqlens: bounds of packed sequences, int32 or int64 [num_sequences + 1]; batch is then 1.
        copies: 2 gives a head's log decays twice, one after the other, for keys that cosine
            doubling (``lrpe``) makes twice as many.
        implementation: "auto", "triton" or "torch".

    Returns:
        log_decay, [batch, seq, heads, copies * key_dim], float32 (float64), keys, shaped as logits
        and in their dtype, and z after the last token of each sequence, shaped as log_mass.

    Raises:
        ValueError: shapes, devices, copies, an unknown implementation, or bounds that are none.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    for name, x, optional in (
        ("logits", logits, False),
        ("log_mass", log_mass, False),
        ("mask", mask, True),
        ("cu_seqlens", cu_seqlens, True),
    ):
        checks.check_tensor(name, x, optional=optional)
    checks.check_float("logits", logits)
    checks.check_rank("logits", logits, "batch seq heads key_dim")
    batch, seq = logits.shape[:2]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, batch, seq, logits.device)
        batch = cu_seqlens.shape[0] - 1
    checks.check_shape("log_mass", log_mass, (batch, *logits.shape[2:]), "rows heads key_dim")
    dtype = checks.accumulation_dtype(logits.dtype)
    checks.check_same("log_mass", log_mass, dtype, logits.device, f"the sums of {logits.dtype}")
    if mask is not None:
        checks.check_shape("mask", mask, logits.shape[:2], "batch seq")
        checks.check_same("mask", mask, torch.bool, logits.device, "logits' mask")
    if type(copies) is not int or copies not in (1, 2):
        raise ValueError(f"copies is {copies!r}; expected 1 or 2")
    request = Request(logits.device, logits.dtype, named=implementation == "triton")
    row: Any = choose("cumulative_softmax", IMPLEMENTATIONS, request, implementation)
    return row.run(logits, log_mass, mask, cu_seqlens, copies)
