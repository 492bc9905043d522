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

import torch
from torch import Tensor

from transnormer.ops.checks import no_autocast
from transnormer.ops.linear_attention.chunk_decay import (
    ChunkDecay,
    ConstantDecay,
    KeyGate,
    NoDecay,
    ScalarGate,
)
from transnormer.ops.linear_attention.chunk_layout import (
    Layout,
    Segment,
    chunks_per_segment,
    segment_bound,
)


class _Decays:
    """Builds the decay of each segment; constant ones are built once a pattern of lengths."""

    def __init__(self, layout: Layout, log_decay: Tensor | None) -> None:
        self._layout, self._log_decay = layout, log_decay
        self._constant: dict[tuple[int, ...], ConstantDecay] = {}

    def of(self, segment: Segment) -> ChunkDecay:
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

    def add_grad(self, grad: Tensor, out: Tensor, segment: Segment) -> None:
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
        self, decay: ChunkDecay, q: Tensor, k: Tensor, v: Tensor, segment: Segment
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
        self,
        do: Tensor,
        carry: Tensor,
        initial: Tensor,
        grad_states: Tensor,
        *,
        with_decay: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and log_decay (None without with_decay); moves grad_states on.

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
        grad_decay = None
        if with_decay:
            grad_decay = self._grad_decay(grad_entry_q, grad_entry_k, entered, left)
        return grad_q, grad_k, grad_v, grad_decay

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
    layout = Layout(q, k, v, cu_seqlens)
    decays = _Decays(layout, log_decay)
    initial = layout.states(initial_state)
    final = initial.clone()
    o = v.new_empty(*q.shape[:3], layout.value_dim)
    bound = segment_bound(layout.seq, layout.sequences, layout.chunks_per_segment)
    boundary = initial.new_zeros(bound, *initial.shape[1:])
    carry, queries, outputs = initial[0], layout.split_heads(q), layout.split_heads(o)
    for index, segment in enumerate(layout.segments()):
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
    final = initial_state.new_empty(initial_state.shape)
    rows, value_dim = batch * kv_heads, v.shape[3]
    per_segment = chunks_per_segment(rows, q.shape[2] // kv_heads, key_dim, value_dim)
    shape = (segment_bound(seq, sequences, per_segment), rows, key_dim, value_dim)
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
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty without with_decay) and initial_state.

    One walk backward over the segments. With dS the gradient of the state that leaves a chunk:
    dQ = dP K + factor * dO S^T, dK = dP^T Q + factor * V dS^T, dV = P^T dO + (factor * K) dS,
    and dS of the chunk before = total * dS + (factor * Q)^T dO.
    """
    layout = Layout(q, k, v, cu_seqlens)
    decays = _Decays(layout, log_decay)
    initial = layout.states(initial_state)
    grad_states = layout.states(grad_final).clone()
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    grad_decay = None
    if with_decay and log_decay is not None:
        grad_decay = log_decay.new_zeros(log_decay.shape, dtype=layout.dtype)
    queries, grads_o, grad_queries = (layout.split_heads(x) for x in (q, grad_o, grad_q))
    # A backward pass may be called under autocast, which would round the sums of the products.
    with no_autocast(q.device.type):
        for index, segment in reversed(list(enumerate(layout.segments()))):
            decay = decays.of(segment)
            q_, k_, v_, do = (layout.gather(x, segment) for x in (queries, k, v, grads_o))
            part = _Part(decay, q_ * scale, k_, v_, segment)
            grads = part.backward(
                do.flatten(2, 3), boundary[index], initial, grad_states, with_decay=with_decay
            )
            layout.scatter(grads[0] * scale, grad_queries, segment)
            layout.scatter(grads[1], grad_k, segment)
            layout.scatter(grads[2], grad_v, segment)
            if grad_decay is not None and grads[3] is not None:
                decays.add_grad(grads[3], grad_decay, segment)
    if grad_decay is None or log_decay is None:
        grad_decay = q.new_empty(0)
    else:
        grad_decay = grad_decay.to(log_decay.dtype)
    return grad_q, grad_k, grad_v, grad_decay, grad_states.view_as(initial_state)


@_chunked_backward.register_fake
def _(
    grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, boundary, scale, with_decay
):
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    grad_decay = log_decay.new_empty(log_decay.shape) if with_decay else q.new_empty(0)
    return (*grads, grad_decay, initial_state.new_empty(initial_state.shape))


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
    # The decays of a TNL layer are constants: what nobody asks for is not computed.
    with_decay = log_decay is not None and ctx.needs_input_grad[3]
    grads = torch.ops.transnormer.chunked_linear_attention_backward(
        grad_o,
        grad_final,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        boundary,
        ctx.scale,
        with_decay,
    )
    grad_decay = grads[3] if with_decay else None
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
