"""The signature of OpenNLPLab's lightning-attention over ``linear_attention``.

    from transnormer.compat.opennlplab import lightning_attn_func

What differs from the package (lightning_attn 0.0.5, and its repository, whose ``variant`` argument
the published 0.0.5 does not have):

- s gets a gradient where it requires one (the package returns none for it);
- s None runs at every dim (0.0.5 fails below dim 129), s = inf is legal (no history; the package
  gives NaN), s < 0 is refused where the values can be seen (on the CPU);
- every dim, dtype and length that ``linear_attention`` takes, on the CPU too, float64 included; the
  package takes powers of two from 32 to 128, and above 128 a key_dim that is a multiple of 64 or
  16 or 32 more (it cuts key_dim into slices of 64 and a rest, which must be a power of two);
- both variants give the exact result at any length (the package's "parallel" leaves the tail of a
  length that is no multiple of 256 unwritten); they differ in nothing here;
- dims above 128 are summed in float32 (the package adds slices rounded to the inputs' dtype);
- fewer heads of k, v and s than of q are legal if they divide them (grouped query);
- the output is a view of a [batch, seq, heads, dim] tensor, not contiguous: merging heads after
  ``transpose(1, 2)`` is free, ``view`` of the [batch, heads, seq, dim] form is not possible.
"""

import torch
from torch import Tensor

from transnormer.ops import checks, linear_attention

VARIANTS = ("chunk_loop", "parallel")


def _check_slopes(s: Tensor, kv_heads: int, device: torch.device) -> None:
    if s.device != device:
        raise ValueError(f"s is on {s.device}; expected {device}, the device of q; move it")
    if not s.is_floating_point():
        raise TypeError(f"s is {s.dtype}; expected a floating dtype, best float32")
    if s.numel() != kv_heads:
        raise ValueError(
            f"s has shape {list(s.shape)}; expected one slope a head, {kv_heads} in all "
            f"([{kv_heads}] or [{kv_heads}, 1, 1])"
        )
    if checks.values_are_visible(s) and not bool((s >= 0).all()):
        raise ValueError(
            f"s holds {float(s.min())}; expected slopes >= 0, since decay is exp(-s); pass the "
            "negative of a log decay"
        )


def lightning_attn_func(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None, variant: str = "chunk_loop"
) -> Tensor:
    """Lightning attention in the layout of the papers' code: o_t = q_t S_t, no scale.

    S_t = exp(-s) S_{t-1} + k_t v_t^T, the state in float32 (float64 for float64 inputs).
    Differentiable in q, k, v and s.
    Source: Qin et al. 2024, arXiv:2401.04658; the module's text lists the differences.

    Args:
        q: queries, [batch, heads, seq, key_dim], any strides.
        k: keys, [batch, kv_heads, seq, key_dim].
        v: values, [batch, kv_heads, seq, value_dim].
        s: slopes >= 0, one a head in any shape: [kv_heads], [kv_heads, 1, 1], [1, kv_heads, 1, 1].
            None is no decay.
        variant: "chunk_loop" or "parallel"; one computation stands behind both.

    Returns:
        o, [batch, heads, seq, value_dim] in q's dtype.

    Raises:
        ValueError: an unknown variant, a shape or device, (CPU, eager) a slope that is NaN or
            negative.
        TypeError: a dtype.
    """
    if variant not in VARIANTS:
        names = " or ".join(repr(name) for name in VARIANTS)
        raise ValueError(f"variant is {variant!r}; expected {names}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, x)
    checks.check_tensor("s", s, optional=True)
    checks.check_rank("q", q, "batch heads seq key_dim")
    checks.check_rank("k", k, "batch kv_heads seq key_dim")
    checks.check_rank("v", v, "batch kv_heads seq value_dim")
    batch, _, seq, key_dim = q.shape
    kv_heads = k.shape[1]
    checks.check_shape("k", k, (batch, kv_heads, seq, key_dim), "batch kv_heads seq key_dim")
    dims = "batch kv_heads seq value_dim"
    checks.check_shape("v", v, (batch, kv_heads, seq, v.shape[3]), dims)
    log_decay = None
    if s is not None:
        _check_slopes(s, kv_heads, q.device)
        log_decay = -s.reshape(kv_heads)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return linear_attention(q, k, v, log_decay)[0].transpose(1, 2)
