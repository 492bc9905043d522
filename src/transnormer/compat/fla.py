"""The signature of flash-linear-attention's simple GLA over ``linear_attention``.

    from transnormer.compat.fla import chunk_simple_gla

What differs from the package (fla-core 0.6.0):

- g and g_gamma together are refused (the package applies both);
- under autocast q, k and v are cast, so float32 inputs give the dtype of autocast (the package
  returns the inputs' dtype);
- g_gamma gets a gradient where it requires one (the package returns none for it);
- the final state is finite at any length and decay (the package's is NaN where the last chunk of 64
  is short and the decay is strong), g = -inf and g_gamma = -inf are legal;
- g and g_gamma above 0 are refused where the values can be seen (on the CPU);
- fewer heads of k and v than of q are legal if they divide them (grouped query); g and g_gamma are
  then indexed by kv heads;
- float64 runs in float64, every dtype runs on the CPU too; float32 means float32, not tf32;
- the package's ``state_v_first``, ``cu_seqlens_cpu`` and ``chunk_size`` do not exist here, so
  arguments after ``output_final_state`` go by name. cu_seqlens causes no synchronisation;
- it compiles under ``torch.compile(fullgraph=True)`` (the package leaves the graph).
"""

from torch import Tensor

from transnormer.ops import checks, linear_attention


def _check_log_decay(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...], dims: str) -> None:
    checks.check_shape(name, x, shape, dims)
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; expected {q.device}, the device of q; move it")
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; expected a floating dtype, best float32")
    if checks.values_are_visible(x) and not bool((x <= 0).all()):
        raise ValueError(
            f"{name} holds {float(x.max())}; expected values <= 0, since decay is exp({name}); "
            "pass the negative of a slope"
        )


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one decay a head, constant or a gate for each token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t; state and sums in float32 (float64
    for float64 inputs). Differentiable in q, k, v, g, g_gamma and initial_state.
    Source: Yang et al. 2024, arXiv:2312.06635; the module's text lists the differences.

    Args:
        q: queries, [batch, seq, heads, key_dim].
        k: keys, [batch, seq, kv_heads, key_dim].
        v: values, [batch, seq, kv_heads, value_dim].
        g: log decay a token, [batch, seq, kv_heads], at most 0. At most one of g and g_gamma.
        g_gamma: constant log decay, [kv_heads], at most 0.
        scale: multiplies the outputs; None is key_dim ** -0.5.
        initial_state: [batch, kv_heads, key_dim, value_dim] (with cu_seqlens [num_sequences, ...]),
            any floating dtype, read in the dtype of the sums.
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: bounds of packed sequences, int32 or int64 [num_sequences + 1]; batch is then 1.

    Returns:
        o, [batch, seq, heads, value_dim] in q's dtype, and the final state, or None.

    Raises:
        ValueError: both g and g_gamma, a shape or device, (CPU, eager) a decay that is NaN or
            positive.
        TypeError: a dtype.
    """
    tensors = {"q": q, "k": k, "v": v}
    optional = {"g": g, "g_gamma": g_gamma, "initial_state": initial_state}
    for name, x in tensors.items():
        checks.check_tensor(name, x)
    for name, y in (optional | {"cu_seqlens": cu_seqlens}).items():
        checks.check_tensor(name, y, optional=True)
    if g is not None and g_gamma is not None:
        raise ValueError("g and g_gamma are both given; expected at most one; add them into g")
    checks.check_float("q", q)
    checks.check_rank("k", k, "batch seq kv_heads key_dim")
    kv_heads = k.shape[2]
    log_decay = None
    if g is not None:
        shape = (k.shape[0], k.shape[1], kv_heads)
        _check_log_decay("g", g, q, shape, "batch seq kv_heads")
        log_decay = g
    elif g_gamma is not None:
        _check_log_decay("g_gamma", g_gamma, q, (kv_heads,), "kv_heads")
        log_decay = g_gamma
    if initial_state is not None:
        initial_state = initial_state.to(checks.accumulation_dtype(q.dtype))
    o, final_state = linear_attention(
        q,
        k,
        v,
        log_decay,
        scale=k.shape[3] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return o, final_state if output_final_state else None
