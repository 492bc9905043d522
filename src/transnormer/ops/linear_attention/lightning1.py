"""Lightning Attention 1: quadratic tiles, constant decay (Qin et al. 2023, arXiv:2307.14995).

The first paper's form computes the masked product tile by tile (algorithms 1 and 2):

    O_i = sum over j <= i of [(Q_i K_j^T) * M_ij] V_j        M_ts = exp(log_decay * (t - s)), t >= s

so memory is linear in length but time is quadratic; Lightning Attention 2 (``chunked``) replaces
all tiles below the diagonal by one state. It is here for that comparison. The backward pass
recomputes a row of tiles at a time and keeps only the inputs.

Legend: B batch, T seq, H kv heads, G query heads a kv head, K key dim, V value dim.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.linear_attention.sequences import over_sequences

_QUERY_TILE = 128
_KEY_TILE = 64


def _weights(log_decay: Tensor, exponent: Tensor) -> Tensor:
    """exp(log_decay * exponent) for exponent >= 0, else 0; [H, ...]."""
    shape = (-1, *[1] * exponent.dim())
    # The exponent 0 is kept out of the product: 0 * -inf is NaN, in the gradient too.
    finite = torch.where(exponent > 0, exponent, 1)
    decayed = (log_decay.view(shape) * finite).exp()
    return torch.where(exponent > 0, decayed, (exponent == 0).to(decayed.dtype))


def _row_of_tiles(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, first: int
) -> Tensor:
    """Outputs of the query tile that starts at token ``first``: q is that tile, k and v are whole."""
    stop = first + q.shape[1]
    query = torch.arange(first, stop, device=q.device)
    entering = _weights(log_decay, query + 1).transpose(0, 1)[None, :, :, None, None]
    out = torch.einsum("bthgk,bhkv->bthgv", q * entering, state)
    for start in range(0, stop, _KEY_TILE):
        end = min(start + _KEY_TILE, stop)
        key = torch.arange(start, end, device=q.device)
        mask = _weights(log_decay, query[:, None] - key)
        scores = torch.einsum("bthgk,bshk->bhgts", q, k[:, start:end]) * mask[None, :, None]
        out = out + torch.einsum("bhgts,bshv->bthgv", scores, v[:, start:end])
    return out


def _sequence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    seq = k.shape[1]
    rows = []
    for start in range(0, seq, _QUERY_TILE):
        tile = q[:, start : start + _QUERY_TILE]
        rows.append(
            checkpoint(_row_of_tiles, tile, k, v, log_decay, state, start, use_reentrant=False)
        )
    leaving = _weights(log_decay, torch.arange(seq - 1, -1, -1, device=q.device))
    added = torch.einsum("hs,bshk,bshv->bhkv", leaving, k, v)
    total = _weights(log_decay, torch.full((1,), seq, device=q.device)).view(1, -1, 1, 1)
    return torch.cat(rows, 1), total * state + added


def lightning1_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Quadratic tiles; arguments and results as ``linear_attention``'s, log_decay None or [H]."""
    dtype = accumulation_dtype(q.dtype)
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[2])
    o, state = over_sequences(
        _sequence,
        q.to(dtype).unflatten(2, (k.shape[2], -1)) * scale,
        k.to(dtype),
        v.to(dtype),
        log_decay.to(dtype),
        initial_state,
        cu_seqlens,
    )
    return o.flatten(2, 3).to(q.dtype), state
