"""Literal float64 forms of what the package computes: slow, short, independent of it.

All take and return ``[batch, seq, heads, dim]``; gradients come from autograd through the loops.
Sources: Qin et al. 2023 (arXiv:2307.14995), Qin et al. 2024 (arXiv:2405.17381), and the released
modelling code of TransNormerLLM where it differs from the text.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def expand_log_decay(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """Any form of log_decay as [batch, seq, kv_heads, key_dim] in float64."""
    if log_decay is None:
        return torch.zeros_like(k, dtype=torch.float64)
    log_decay = log_decay.double()
    if log_decay.dim() == 1:
        log_decay = log_decay[None, None, :, None]
    elif log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    return log_decay.expand(k.shape)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T; o_t = scale q_t S_t, token by token."""
    batch, seq, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, heads // kv_heads))
    outputs = []
    for t in range(seq):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = log_decay[:, t, :, :, None].exp() * state + update
        outputs.append(scale * torch.einsum("bhgk,bhkv->bhgv", grouped[:, t], state).flatten(1, 2))
    if not outputs:
        return q.new_zeros(batch, 0, heads, v.shape[-1]), state
    return torch.stack(outputs, 1), state


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The whole contract by the recurrence, sequence after sequence, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    decay = expand_log_decay(log_decay, k)
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = q.shape[0] if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        initial_state = q.new_zeros(rows, k.shape[2], k.shape[3], v.shape[3])
    initial_state = initial_state.double()
    outputs, states = [], []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        parts = [x[:, start:stop] for x in (q, k, v, decay)]
        if reverse:
            parts = [x.flip(1) for x in parts]
        state = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        o, state = recurrence(*parts, scale, state)
        outputs.append(o.flip(1) if reverse else o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states, 0)


def dense_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float = 1.0
) -> Tensor:
    """O = scale ((Q K^T) * M) V with M_ts = exp(log_decay (t - s)), t >= s; constant decay."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    slopes = log_decay.double().repeat_interleave(group)[:, None, None]
    # Distance 0 is exempt: -inf times 0 is NaN, and a token always sees itself.
    weights = torch.where(distance > 0, slopes * distance.clamp(min=1), 0.0).exp()
    mask = torch.where(distance >= 0, weights, 0.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * mask
    return scale * torch.einsum("bhts,bshv->bthv", scores, v)


def closed_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ = [(dO V^T) * M] K, dK = [(dO V^T) * M]^T Q, dV = [(Q K^T) * M]^T dO; one kv head each."""
    seq = q.shape[1]
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    decays = (log_decay.double()[:, None, None] * distance.clamp(min=0)).exp()
    mask = torch.where(distance >= 0, decays, 0.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * mask
    d_scores = torch.einsum("bthv,bshv->bhts", do, v) * mask
    dq = torch.einsum("bhts,bshk->bthk", d_scores, k)
    dk = torch.einsum("bhts,bthk->bshk", d_scores, q)
    dv = torch.einsum("bhts,bthv->bshv", scores, do)
    return dq, dk, dv


def srms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps): no weight, no bias."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def lrpe_theta(heads: int, head_dim: int) -> Tensor:
    """10000^(-2j/d) with j the flat index over all heads, d = heads * head_dim: [heads, 1, p]."""
    model_dim = heads * head_dim
    exponents = -2.0 * torch.arange(model_dim, dtype=torch.float64) / model_dim
    return (10000.0**exponents).reshape(heads, 1, head_dim)


def lrpe(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """[x cos(t theta); x sin(t theta)], [batch, seq, heads, dim] to twice the dim."""
    angles = positions.double()[..., None, None] * theta.double().squeeze(1)
    x = x.double()
    return torch.cat([x * angles.cos(), x * angles.sin()], -1)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8h/H) for a power of two; else that list and every second entry of twice the power's."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    power = 2 ** int(math.log2(heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: heads - power]


def tnl_log_decay(heads: int, layer_index: int, num_layers: int) -> Tensor:
    """-s_h (1 - l / (L - 1) + 1e-5), the released rule, float64."""
    factor = 1 - layer_index / max(num_layers - 1, 1) + 1e-5
    return -factor * torch.tensor(alibi_slopes(heads), dtype=torch.float64)


def gla_block(
    x: Tensor,
    qkvu: Tensor,
    out: Tensor,
    heads: int,
    log_decay: Tensor,
    theta: Tensor | None,
    positions: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = (N(O) * U) W_o with q, k through silu, LRPE after it; weights are [out, in]."""
    q, k, v, u = (x.double() @ qkvu.double().T).chunk(4, -1)
    silu = torch.nn.functional.silu
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (silu(q), silu(k), v))
    if theta is not None:
        q, k = lrpe(q, positions, theta), lrpe(k, positions, theta)
    o, state = linear_attention(q, k, v, log_decay, initial_state=state)
    return (srms_norm(o.flatten(2)) * u) @ out.double().T, state


def sglu(x: Tensor, l1: Tensor, l2: Tensor, l3: Tensor) -> Tensor:
    """((x W1) * (x W2)) W3: no activation."""
    return ((x.double() @ l1.double().T) * (x.double() @ l2.double().T)) @ l3.double().T


def tnl_logits(
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    num_layers: int,
    heads: int,
    offset: int = 0,
    log_decays: list[Tensor] | None = None,
) -> Tensor:
    """Logits of a whole TransNormerLLM in float64, [batch, seq, vocab_size].

    Args:
        weights: named as in this package's checkpoints; theta where a layer has LRPE.
        input_ids: tokens, [batch, seq].
        num_layers: blocks.
        heads: of every block.
        offset: position of the first token.
        log_decays: one [heads] a layer; default the released rule.
    """
    embedding = weights["embedding.weight"].double()
    x = math.sqrt(embedding.shape[1]) * embedding[input_ids]
    positions = torch.arange(offset, offset + input_ids.shape[1]).expand(input_ids.shape)
    for i in range(num_layers):
        part = {
            name.removeprefix(f"blocks.{i}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blocks.{i}.")
        }
        decay = log_decays[i] if log_decays else tnl_log_decay(heads, i, num_layers)
        y, _ = gla_block(
            srms_norm(x),
            part["token_mixer.qkvu_proj.weight"],
            part["token_mixer.out_proj.weight"],
            heads,
            decay,
            part.get("token_mixer.lrpe.theta"),
            positions,
        )
        x = x + y
        names = ("gate_proj", "up_proj", "down_proj")
        x = x + sglu(srms_norm(x), *(part[f"channel_mixer.{name}.weight"] for name in names))
    head = weights.get("lm_head.weight", weights["embedding.weight"])
    return srms_norm(x) @ head.double().T
