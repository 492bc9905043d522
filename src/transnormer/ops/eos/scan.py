"""Any oscillation, chunk after chunk: the memory of every token exists for one chunk at a time.

    m_t = o_t m_{t-1} + e_t i_t^T           y_t = Re(m_t^T s_t)
    dm_t = o_{t+1}^* dm_{t+1} + s_t^* dy_t^T
    ds_t = m_t^* dy_t,  de_t = dm_t i_t^*,  di_t = dm_t^T e_t^*,  do_t = dm_t m_{t-1}^*

(the star is the conjugate, transposed for matrices). The backward pass computes the memories of a
chunk again from the one before it, so what is kept is one memory a chunk. Only products of factors
occur, never quotients: nothing overflows at any strength of decay, and 0 is a factor like any other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transnormer.ops.eos.call import Call
from transnormer.ops.eos.reference import factors

# Entries of the memories of one chunk over the batch: 32 MB of float32.
CHUNK_ENTRIES = 1 << 23
LONGEST_CHUNK = 32
# Below so many entries a token, a call of an operation costs more than its work.
FEW_ENTRIES = 1 << 14


def _chunk_size(per_token: int) -> int:
    """The largest power of two of tokens whose memories fit; at least one token."""
    size = LONGEST_CHUNK
    while size > 1 and size * per_token > CHUNK_ENTRIES:
        size //= 2
    return size


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    """x of some tokens; a constant as it is."""
    return x[:, start:stop] if x.shape[1] > 1 else x


def _outer(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The outer product of each token, [batch, tokens, heads, key_dim, value_dim]."""
    return (keys[..., :, None] * values[..., None, :]).to(dtype)


def _doubled(o: Tensor, x: Tensor) -> Tensor:
    """x_t + o_t x_{t-1} + o_t o_{t-1} x_{t-2} + ... along dim 1, by strides that double.

    After the step of stride w, entry t holds the terms of the last 2 w tokens up to t and the
    product of their factors.
    """
    tokens = x.shape[1]
    o, stride = o.expand(-1, tokens, -1, -1, -1), 1
    while stride < tokens:
        x = torch.cat([x[:, :stride], x[:, stride:] + o[:, stride:] * x[:, :-stride]], 1)
        o = torch.cat([o[:, :stride], o[:, stride:] * o[:, :-stride]], 1)
        stride *= 2
    return x


def _few(memory: Tensor, matmul: bool) -> bool:
    return not matmul and memory.numel() < FEW_ENTRIES


def _add_decayed(here: Tensor, o: Tensor, t: int, memory: Tensor, matmul: bool) -> Tensor:
    """here + o_t memory, written to here."""
    factor = o[:, t if o.shape[1] > 1 else 0]
    return here.add_(factor @ memory) if matmul else here.addcmul_(factor, memory)


def _memories(o: Tensor | None, x: Tensor, memory: Tensor, matmul: bool) -> Tensor:
    """All memories of a chunk, from the one before it and what its tokens add (overwritten)."""
    if o is None:
        return x.cumsum(1) + memory[:, None]
    if _few(memory, matmul):
        first = x[:, :1] + o[:, :1] * memory[:, None]
        return _doubled(o, torch.cat([first, x[:, 1:]], 1))
    for t in range(x.shape[1]):
        memory = _add_decayed(x[:, t], o, t, memory, matmul)
    return x


def _gradients_of_memories(
    o: Tensor | None, x: Tensor, last: Tensor, matmul: bool
) -> tuple[Tensor, Tensor]:
    """dm of a chunk, and what it sends to the memory before: the recurrence from its end.

    Args:
        o: factors of the chunk.
        x: what each token's output sends to its memory; overwritten.
        last: what the tokens behind the chunk send to its last memory.
        matmul: whether factors are matrices.
    """
    tokens = x.shape[1]
    x[:, -1].add_(last)
    if o is None:
        dm = x.flip(1).cumsum(1).flip(1)
        return dm, dm[:, 0]
    o = (o.transpose(-1, -2) if matmul else o).conj()
    # m_t meets the factor of token t + 1.
    if _few(last, matmul):
        later = torch.cat([o[:, 1:], o[:, :1]], 1) if o.shape[1] > 1 else o
        x = _doubled(later.flip(1), x.flip(1)).flip(1)
    else:
        for t in reversed(range(tokens - 1)):
            _add_decayed(x[:, t], o, t + 1, x[:, t + 1], matmul)
    return x, o[:, 0] @ x[:, 0] if matmul else o[:, 0] * x[:, 0]


class _Sums:
    """Gradients of one input over the chunks, last chunk first: of its tokens, or summed."""

    def __init__(self, like: Tensor | None) -> None:
        self.like, self.parts = like, []

    def add(self, gradient: Tensor) -> None:
        like = self.like
        assert like is not None
        if gradient.is_complex() and not like.is_complex():
            gradient = gradient.real
        tokens = gradient.shape[1] if like.shape[1] > 1 else 1
        self.parts.append(gradient.sum_to_size(like.shape[0], tokens, *like.shape[2:]))

    def total(self) -> Tensor | None:
        if not self.parts:
            return None
        if self.like is not None and self.like.shape[1] > 1:
            return torch.cat(self.parts[::-1], 1)
        return torch.stack(self.parts).sum(0)


class _Scan(torch.autograd.Function):
    """y and the last memory of widened inputs; i, e, s and o have seq dim 1 where constant."""

    @staticmethod
    def forward(
        ctx: Any,
        i: Tensor,
        e: Tensor,
        s: Tensor,
        o: Tensor | None,
        memory: Tensor,
        matmul: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        seq, dtype = i.shape[1], memory.dtype
        outputs, kept = [], []
        for start in range(0, seq, size):
            stop = min(start + size, seq)
            kept.append(memory)
            added = _outer(_part(e, start, stop), i[:, start:stop], dtype)
            factor = None if o is None else _part(o, start, stop)
            memories = _memories(factor, added, memory, matmul)
            y = (_part(s, start, stop)[..., None] * memories).sum(-2)
            outputs.append(y.real if y.is_complex() else y)
            memory = memories[:, -1].clone()
        ctx.save_for_backward(i, e, s, o, *kept)
        ctx.matmul, ctx.size = matmul, size
        return torch.cat(outputs, 1), memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        i, e, s, o, *kept = ctx.saved_tensors
        matmul, size, dtype = ctx.matmul, ctx.size, last.dtype
        di, de, ds, do = (_Sums(x) for x in (i, e, s, o))
        for n in reversed(range(len(kept))):
            here = slice(n * size, min((n + 1) * size, i.shape[1]))
            i_, dy_ = i[:, here], dy[:, here]
            e_, s_ = (_part(x, here.start, here.stop) for x in (e, s))
            o_ = None if o is None else _part(o, here.start, here.stop)
            memories = _memories(o_, _outer(e_, i_, dtype), kept[n], matmul)
            dm, last = _gradients_of_memories(o_, _outer(s_.conj(), dy_, dtype), last, matmul)
            ds.add((memories.conj() * dy_[..., None, :]).sum(-1))
            de.add((dm * i_.conj()[..., None, :]).sum(-1))
            di.add((dm * e_.conj()[..., None]).sum(-2))
            if o is not None and ctx.needs_input_grad[3]:
                before = torch.cat([kept[n][:, None], memories[:, :-1]], 1).conj()
                do.add(dm @ before.transpose(-1, -2) if matmul else dm * before)
        return di.total(), de.total(), ds.total(), do.total(), last, None, None


def scan(call: Call) -> tuple[Tensor, Tensor]:
    """Chunks of up to 32 tokens, fewer for large states; differentiable once."""
    i, e, s = (call.widened(x) for x in (call.i, call.e, call.s))
    memory, o = call.initial_state(), factors(call, 0, i.shape[1])
    size = _chunk_size(memory.numel())
    y, memory = _Scan.apply(i, e, s, o, memory, call.psi == "matmul", size)
    return y.to(call.output_dtype), memory
