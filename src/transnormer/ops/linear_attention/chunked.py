"""The chunked form in plain PyTorch: Lightning Attention-2's split, for any decay. The CPU path.

A sequence is cut into chunks of C tokens. Inside a chunk the masked quadratic form; between chunks
the state, which each chunk decays and adds to (Qin et al. 2024, arXiv:2401.04658, algorithms 1 and
2; ``chunk_decay`` holds what decay does to both parts):

    O_n = [(Q_n K_n^T) * M] V_n + (query factor * Q_n) S_n
    S_{n+1} = total factor * S_n + (key factor * K_n)^T V_n

Time and memory are linear in length. Chunks are processed in segments, so that the temporaries of
one segment stay in the cache and no tensor of the size of all chunk states exists; the forward pass
keeps the state at the start of each segment and the backward pass recomputes the rest.

All arithmetic is in the accumulation dtype (float32; float64 for float64 inputs). The whole is one
``torch.library`` op with its backward as a second one, so that torch.compile sees one node.

Legend: B batch, H kv heads, G query heads a kv head, T seq, X rows (B * H, packed: H), N chunks of
a segment, C tokens a chunk, K key dim, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype, no_autocast
from transnormer.ops.linear_attention.chunk_decay import (
    ChunkDecay,
    ConstantDecay,
    KeyGate,
    NoDecay,
    ScalarGate,
)

# Measured on CPUs: 32 and 128 are slower, with constant and with gated decay.
_MAX_CHUNK = 64
# Elements of one [X, N, C, dim] temporary: 1 MiB in float32, so that a few of them fit the cache.
_SEGMENT_ELEMENTS = 1 << 18


class _Chunk(NamedTuple):
    sequence: int  # row of the state that it belongs to; 0 where sequences lie along the batch
    start: int
    length: int
    first: bool
    last: bool


class _Segment(NamedTuple):
    chunks: list[_Chunk]
    start: int
    stop: int


def _chunks_per_segment(rows: int, groups: int, key_dim: int, value_dim: int) -> int:
    widest = max(key_dim * groups, value_dim, _MAX_CHUNK * groups)
    return max(_SEGMENT_ELEMENTS // (rows * widest * _MAX_CHUNK), 1)


def _segment_bound(seq: int, sequences: int, chunks_per_segment: int) -> int:
    """At least the number of segments, in arithmetic that symbolic lengths can do.

    A sequence has at most one partial chunk; chunks below the largest size are at least as long as
    the mean sequence, which makes at most 3 a sequence.
    """
    return (seq // _MAX_CHUNK + 3 * sequences) // chunks_per_segment + 1


class _Layout:
    """How tokens map to chunks and segments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.seq, self.kv_heads, self.key_dim = k.shape
        self.value_dim = v.shape[3]
        self.groups = q.shape[2] // self.kv_heads
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1
        self.rows = self.batch * self.kv_heads
        mean = max(self.seq // self.sequences, 1)
        self.chunk = min(1 << (mean - 1).bit_length(), _MAX_CHUNK)
        self.chunks_per_segment = _chunks_per_segment(
            self.rows, self.groups, self.key_dim, self.value_dim
        )
        self.dtype, self.device = accumulation_dtype(q.dtype), q.device

    def segments(self, cu_seqlens: Tensor | None) -> list[_Segment]:
        bounds = cu_seqlens.tolist() if cu_seqlens is not None else [0, self.seq]
        chunks = []
        for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            for start in range(begin, end, self.chunk):
                stop = min(start + self.chunk, end)
                chunk = _Chunk(sequence, start, stop - start, start == begin, stop == end)
                chunks.append(chunk)
        size = self.chunks_per_segment
        groups = [chunks[i : i + size] for i in range(0, len(chunks), size)]
        return [_Segment(g, g[0].start, g[-1].start + g[-1].length) for g in groups]

    def gather(self, x: Tensor, segment: _Segment) -> Tensor:
        """[B, T, H, ...] -> [X, N, C, ...] of one segment, zeros where a chunk is short."""
        part = x[:, segment.start : segment.stop].to(self.dtype)
        size = len(segment.chunks) * self.chunk
        if part.shape[1] != size:
            padded = part.new_zeros(part.shape[0], size, *part.shape[2:])
            padded[:, self._token_rows(segment)] = part
            part = padded
        return part.transpose(1, 2).contiguous().view(self.rows, -1, self.chunk, *part.shape[3:])

    def scatter(self, x: Tensor, out: Tensor, segment: _Segment) -> None:
        """The reverse of gather, into the segment's tokens of out."""
        size = len(segment.chunks) * self.chunk
        part = x.reshape(self.batch, self.kv_heads, size, *out.shape[3:]).transpose(1, 2)
        if segment.stop - segment.start != size:
            part = part[:, self._token_rows(segment)]
        out[:, segment.start : segment.stop] = part

    def _token_rows(self, segment: _Segment) -> Tensor:
        pieces = [
            torch.arange(n * self.chunk, n * self.chunk + c.length)
            for n, c in enumerate(segment.chunks)
        ]
        return torch.cat(pieces).to(self.device)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads, dim] -> [B, T, H, G, dim]: query heads beside their kv head."""
        return x.unflatten(2, (self.kv_heads, self.groups))

    def states(self, x: Tensor) -> Tensor:
        """[B or sequences, H, K, V] -> [sequences, X, K, V] in the accumulation dtype."""
        return x.to(self.dtype).view(self.sequences, self.rows, self.key_dim, self.value_dim)


class _Decays:
    """Builds the decay of each segment; constant ones are built once a pattern of lengths."""

    def __init__(self, layout: _Layout, log_decay: Tensor | None) -> None:
        self._layout, self._log_decay = layout, log_decay
        self._constant: dict[tuple[int, ...], ConstantDecay] = {}

    def of(self, segment: _Segment) -> ChunkDecay:
        layout, log_decay = self._layout, self._log_decay
        if log_decay is None:
            return NoDecay()
        if log_decay.dim() == 1:
            lengths = tuple(c.length for c in segment.chunks)
            if min(lengths) == layout.chunk:
                lengths = (layout.chunk,)
            if lengths not in self._constant:
                rows = log_decay.to(layout.dtype).repeat(layout.batch)
                self._constant[lengths] = ConstantDecay(rows, lengths, layout.chunk)
            return self._constant[lengths]
        gates = layout.gather(log_decay, segment)
        return ScalarGate(gates[..., None]) if log_decay.dim() == 3 else KeyGate(gates)

    def add_grad(self, grad: Tensor, out: Tensor, segment: _Segment) -> None:
        """Add (constant) or place (gated) one segment's gradient of log_decay."""
        assert self._log_decay is not None
        if self._log_decay.dim() == 1:
            out += grad.view(self._layout.batch, -1).sum(0)
            return
        self._layout.scatter(grad[..., 0] if self._log_decay.dim() == 3 else grad, out, segment)


def _decayed(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _Part:
    """The arithmetic of one segment: q [X, N, C, G, K] scaled, k [X, N, C, K], v [X, N, C, V]."""

    def __init__(
        self, decay: ChunkDecay, q: Tensor, k: Tensor, v: Tensor, segment: _Segment
    ) -> None:
        self.decay, self.q, self.k, self.v, self.chunks = decay, q, k, v, segment.chunks
        self.factors = decay.factors
        self.query_factor = None if self.factors is None else self.factors.query[..., None, :]
        self.key_factor = None if self.factors is None else self.factors.key
        self.entry_q = _decayed(q, self.query_factor)
        self.entry_k = _decayed(k, self.key_factor)
        self.added = self.entry_k.mT @ v

    def _total(self, n: int) -> Tensor | float:
        """Decay of the state over chunk n, [X, 1 or K, 1]."""
        if self.factors is None:
            return 1.0
        return self.factors.total[:, min(n, self.factors.total.shape[1] - 1)].mT

    def _states(self, carry: Tensor, initial: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States that enter the chunks, [X, N, K, V], and those that leave them, [X, K, V] each."""
        entered, leaving = torch.empty_like(self.added), []
        for n, chunk in enumerate(self.chunks):
            entering = initial[chunk.sequence] if chunk.first else carry
            entered[:, n] = entering
            carry = self.added[:, n] + self._total(n) * entering
            leaving.append(carry)
        return entered, leaving

    def forward(self, carry: Tensor, initial: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, [X, N, C * G, V], and the last state; fills the final states that are reached."""
        entered, leaving = self._states(carry, initial)
        for chunk, state in zip(self.chunks, leaving, strict=True):
            if chunk.last:
                final[chunk.sequence] = state
        out = self.decay.scores(self.q, self.k) @ self.v
        return out.add_(self.entry_q.flatten(2, 3) @ entered), leaving[-1]

    def backward(
        self, do: Tensor, carry: Tensor, initial: Tensor, grad_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and log_decay (None without decay); moves grad_states on.

        A sequence's row of grad_states holds the running gradient: of its final state before its
        last chunk was met, of its initial state after its first one.
        """
        entered, _ = self._states(carry, initial)
        left, flat_q = torch.empty_like(entered), self.entry_q.flatten(2, 3)
        from_outputs = flat_q.mT @ do
        for n, chunk in reversed(list(enumerate(self.chunks))):
            left[:, n] = grad_states[chunk.sequence]
            grad_states[chunk.sequence] *= self._total(n)
            grad_states[chunk.sequence] += from_outputs[:, n]
        scores = self.decay.scores(self.q, self.k)
        grad_v = (scores.mT @ do).add_(self.entry_k @ left)
        grad_q, grad_k = self.decay.scores_backward(self.q, self.k, scores, do @ self.v.mT)
        grad_entry_q, grad_entry_k = (do @ entered.mT).view_as(self.q), self.v @ left.mT
        grad_q += _decayed(grad_entry_q, self.query_factor)
        grad_k += _decayed(grad_entry_k, self.key_factor)
        return grad_q, grad_k, grad_v, self._grad_decay(grad_entry_q, grad_entry_k, entered, left)

    def _grad_decay(
        self, grad_entry_q: Tensor, grad_entry_k: Tensor, entered: Tensor, left: Tensor
    ) -> Tensor | None:
        if self.factors is None:
            return None
        shares = (
            (grad_entry_q * self.entry_q).sum(3),
            grad_entry_k * self.entry_k,
            (self.factors.total.mT * entered * left).sum(-1)[:, :, None],
        )
        if self.factors.query.shape[-1] == 1:
            shares = tuple(x.sum(-1, keepdim=True) for x in shares)
        return self.decay.factors_backward(*shares)


@torch.library.custom_op("transnormer::chunked_linear_attention", mutates_args=())
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states, and the state at the start of each segment for the backward."""
    layout = _Layout(q, k, v, cu_seqlens)
    decays = _Decays(layout, log_decay)
    initial = layout.states(initial_state)
    final = initial.clone()
    o = v.new_empty(*q.shape[:3], layout.value_dim)
    bound = _segment_bound(layout.seq, layout.sequences, layout.chunks_per_segment)
    boundary = initial.new_zeros(bound, *initial.shape[1:])
    carry, queries, outputs = initial[0], layout.split_heads(q), layout.split_heads(o)
    for index, segment in enumerate(layout.segments(cu_seqlens)):
        boundary[index] = carry
        q_, k_, v_ = (layout.gather(x, segment) for x in (queries, k, v))
        part = _Part(decays.of(segment), q_ * scale, k_, v_, segment)
        out, carry = part.forward(carry, initial, final)
        layout.scatter(out.unflatten(2, (-1, layout.groups)), outputs, segment)
    return o, final.view_as(initial_state), boundary


@_chunked.register_fake
def _(q, k, v, log_decay, initial_state, cu_seqlens, scale):
    batch, seq, kv_heads, key_dim = k.shape
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1
    final = torch.empty_like(initial_state)
    rows, value_dim = batch * kv_heads, v.shape[3]
    per_segment = _chunks_per_segment(rows, q.shape[2] // kv_heads, key_dim, value_dim)
    shape = (_segment_bound(seq, sequences, per_segment), rows, key_dim, value_dim)
    return v.new_empty(*q.shape[:3], value_dim), final, final.new_empty(shape)


@torch.library.custom_op("transnormer::chunked_linear_attention_backward", mutates_args=())
def _chunked_backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    boundary: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty where it is None) and initial_state.

    One walk backward over the segments. With dS the gradient of the state that leaves a chunk:
    dQ = dP K + factor * dO S^T, dK = dP^T Q + factor * V dS^T, dV = P^T dO + (factor * K) dS,
    and dS of the chunk before = total * dS + (factor * Q)^T dO.
    """
    layout = _Layout(q, k, v, cu_seqlens)
    decays = _Decays(layout, log_decay)
    initial = layout.states(initial_state)
    grad_states = layout.states(grad_final).clone()
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    decay_shape = (0,) if log_decay is None else log_decay.shape
    grad_decay = q.new_zeros(decay_shape, dtype=layout.dtype)
    queries, grads_o, grad_queries = (layout.split_heads(x) for x in (q, grad_o, grad_q))
    # A backward pass may be called under autocast, which would round the sums of the products.
    with no_autocast(q.device.type):
        for index, segment in reversed(list(enumerate(layout.segments(cu_seqlens)))):
            decay = decays.of(segment)
            q_, k_, v_, do = (layout.gather(x, segment) for x in (queries, k, v, grads_o))
            part = _Part(decay, q_ * scale, k_, v_, segment)
            grads = part.backward(do.flatten(2, 3), boundary[index], initial, grad_states)
            layout.scatter(grads[0] * scale, grad_queries, segment)
            layout.scatter(grads[1], grad_k, segment)
            layout.scatter(grads[2], grad_v, segment)
            if grads[3] is not None:
                decays.add_grad(grads[3], grad_decay, segment)
    if log_decay is not None:
        grad_decay = grad_decay.to(log_decay.dtype)
    return grad_q, grad_k, grad_v, grad_decay, grad_states.view_as(initial_state)


@_chunked_backward.register_fake
def _(grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, boundary, scale):
    grad_decay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (*grads, grad_decay, torch.empty_like(initial_state))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens, output[2])
    ctx.scale = scale
    # The states between segments take no gradient; zeros of their size would be made otherwise.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_final, _):
    q, k, v, log_decay, initial_state, cu_seqlens, boundary = ctx.saved_tensors
    if grad_o is None:
        grad_o = v.new_zeros(*q.shape[:3], v.shape[3])
    if grad_final is None:
        grad_final = torch.zeros_like(initial_state)
    grads = torch.ops.transnormer.chunked_linear_attention_backward(
        grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, boundary, ctx.scale
    )
    grad_decay = None if log_decay is None else grads[3]
    return grads[0], grads[1], grads[2], grad_decay, grads[4], None, None


_chunked.register_autograd(_backward, setup_context=_setup_context)


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Linear attention in linear time, in plain PyTorch; arguments as ``linear_attention``'s."""
    o, final_state, _ = _chunked(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    return o, final_state
