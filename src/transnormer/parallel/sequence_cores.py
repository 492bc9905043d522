"""Linear attention over sequences that are cut into parts, one a rank.

It replaces the parameter-free core of the mixers. While no part is set it is that core.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transnormer.nn.core import LinearAttentionCore, bidirectional, without_pads
from transnormer.ops import linear_attention
from transnormer.ops.checks import accumulation_dtype, autocast_dtype, no_autocast
from transnormer.ops.joint_attention import joint_attention
from transnormer.ops.joint_attention.in_parts import joint_attention_in_parts, runs_in_parts
from transnormer.parallel.sequence_part import SequenceAxis, SequencePart
from transnormer.parallel.state_exchange import Entering, start


class SequenceLinearCore(LinearAttentionCore):
    """Linear attention over a sequence whose parts lie on the ranks of a chain.

    Every rank computes the state M that its last sequence leaves without a past, and the decay a of
    its tokens together; ``Entering`` turns the (M, a) of all ranks into the state S that enters each;
    the op then runs on the part from S. Bidirectional models exchange in both directions. A log_decay
    that wants no gradient and has one number a head is taken for a constant of the layer: which heads
    are pruned is read off it once for each cutting.

    Source: Sun et al. 2024 (arXiv:2404.02882), Sun et al. 2025 (arXiv:2502.07563), with decay.
    """

    def __init__(self, core: LinearAttentionCore, axis: SequenceAxis) -> None:
        super().__init__(causal=core.causal, implementation=core.implementation)
        self.axis = axis
        self._near: dict[tuple[Any, ...], Tensor | None] = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        state: Any,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """As ``LinearAttentionCore.forward``, on this rank's part.

        The given state counts for the sequences that begin in this part; the row of one that began
        before is not read. The returned one is that after this part.
        """
        run = super().forward if self.axis.part is None else self.in_parts
        return run(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens, mask=mask)

    def joint(
        self,
        projected: Tensor,
        log_decay: Tensor | None,
        *,
        head_dim: int,
        eps: float,
        cu_seqlens: Tensor | None,
        implementation: str,
    ) -> Tensor | None:
        """As ``LinearAttentionCore.joint``, on this rank's part.

        What decides is the same on all ranks: pads of the whole batch, and no lengths of parts, nor
        where documents begin.
        """
        part = self.axis.part
        how: dict[str, Any] = {"head_dim": head_dim, "implementation": implementation}
        if part is None:
            return joint_attention(projected, log_decay, eps=eps, cu_seqlens=cu_seqlens, **how)
        # A part without pads has no mask of its own, where another one's has.
        if cu_seqlens is not None or part.mask is not None or self.axis.overlap:
            return None
        if not runs_in_parts(projected, log_decay, **how):
            return None
        return self.joint_in_parts(projected, log_decay, eps=eps, **how)

    def joint_in_parts(
        self,
        projected: Tensor,
        log_decay: Tensor | None,
        *,
        head_dim: int,
        eps: float,
        implementation: str,
    ) -> Tensor:
        """``joint`` where a part of one sequence a row is set and the kernels can run it.

        The messages are those of ``forward``.
        """
        part = self.axis.part
        assert part is not None
        q = projected.unflatten(-1, (-1, head_dim))[:, :, : projected.shape[-1] // (4 * head_dim)]
        total = _total(log_decay, q)
        near = self._near_heads(log_decay, total.dtype, part)

        def exchange(*, reverse: bool) -> Callable[[Tensor], Tensor]:
            chain = self.axis.chain
            return lambda state: start(chain, state, total, near, reverse=reverse)()

        return joint_attention_in_parts(
            projected, log_decay, head_dim=head_dim, eps=eps, ahead=exchange(reverse=False),
            back=exchange(reverse=True), implementation=implementation,
        )  # fmt: skip

    def in_parts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        state: Any,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """``forward`` where a part is set."""
        part = self.axis.part
        assert part is not None
        q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
        with no_autocast(q.device.type):
            if mask is not None:
                k, log_decay = without_pads(k, log_decay, mask)
            if not self.causal:
                return self._both_directions(q, k, v, log_decay, cu_seqlens, part), None
            return self._causal(q, k, v, log_decay, state, cu_seqlens, part)

    def _causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        part: SequencePart,
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            dtype = accumulation_dtype(k.dtype)
            state = k.new_zeros(rows, *k.shape[2:], v.shape[3], dtype=dtype)
        elif part.history:
            state = torch.cat([torch.zeros_like(state[: k.shape[0]]), state[k.shape[0] :]])
        leaving = self._leave(k, v, log_decay, state, part, reverse=False)

        def run(initial: Tensor) -> tuple[Tensor, Tensor]:
            return linear_attention(
                q, k, v, log_decay, initial_state=initial, cu_seqlens=cu_seqlens,
                implementation=self._implementation(log_decay),
            )  # fmt: skip

        if not self.axis.overlap:
            k, entering = leaving.take(k)
            return run(_with_first(state, entering) if part.history else state)
        o, final = run(state)
        o, entering = leaving.take(o)
        if part.history:
            head = slice(0, part.first_end)
            decay = _decay_to(_tokens(log_decay, head), k[:, head], including=True)
            share = _read(q[:, head], decay, entering)
            o = torch.cat([o[:, head] + share, o[:, part.first_end :]], 1)
            total = _total(_tokens(log_decay, head), k[:, head])
            final = _with_first(final, final[: k.shape[0]] + total.exp()[..., None] * entering)
        return o, final

    def _implementation(self, log_decay: Tensor | None) -> str:
        # Pads have made a constant decay a gate, which not every implementation has.
        gated = log_decay is not None and log_decay.dim() > 1
        return "auto" if gated else self.implementation

    def _leave(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        part: SequencePart,
        *,
        reverse: bool,
    ) -> Entering:
        """Send off what this part leaves to the parts behind it (reverse: before it)."""
        tail = slice(0, part.first_end) if reverse else slice(part.last_start, None)
        k, v, decay = k[:, tail], v[:, tail], _tokens(log_decay, tail)
        own = _write(k, _decay_from(decay, k, reverse=reverse), v)
        total = _total(decay, k)
        continues = part.one_sequence and (part.future if reverse else part.history) > 0
        if not continues:
            if state is not None:
                own = own + total.exp()[..., None] * state[-k.shape[0] :]
            # What came before this sequence ends here.
            total = torch.full_like(total, -math.inf)
        near = self._near_heads(log_decay, own.dtype, part)
        return Entering(self.axis.chain, own, total, near=near, reverse=reverse)

    def _both_directions(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        part: SequencePart,
    ) -> Tensor:
        leaving = [self._leave(k, v, log_decay, None, part, reverse=x) for x in (False, True)]
        k, ahead = leaving[0].take(k)
        k, back = leaving[1].take(k)
        if cu_seqlens is not None:
            others = k.new_zeros(cu_seqlens.shape[0] - 2, *ahead.shape[1:], dtype=ahead.dtype)
            ahead, back = torch.cat([ahead, others]), torch.cat([others, back])
        if not part.history:
            ahead = torch.zeros_like(ahead)
        if not part.future:
            back = torch.zeros_like(back)
        how = self._implementation(log_decay)
        return bidirectional(q, k, v, log_decay, cu_seqlens, how, (ahead, back))

    def _near_heads(
        self, log_decay: Tensor | None, dtype: torch.dtype, part: SequencePart
    ) -> Tensor | None:
        """Heads whose states need not pass a whole part: exp(total) is below half an eps."""
        between = part.lengths[1:-1]
        if not (self.axis.prune and between) or log_decay is None or log_decay.dim() > 1:
            return None
        # A mask makes gates of constants, on all ranks or on some.
        if part.mask is not None or log_decay.requires_grad:
            return None
        key = (part.lengths, dtype)
        if key not in self._near:
            reach = math.log(torch.finfo(dtype).eps / 2)
            near = (log_decay.double() * min(between) <= reach).nonzero()[:, 0]
            self._near[key] = near if near.numel() else None
        return self._near[key]


def _with_first(state: Tensor, first: Tensor) -> Tensor:
    """A state whose first rows are others."""
    return torch.cat([first, state[first.shape[0] :]])


def _tokens(log_decay: Tensor | None, part: slice) -> Tensor | None:
    if log_decay is None or log_decay.dim() == 1:
        return log_decay
    return log_decay[:, part]


def _per_token(log_decay: Tensor, k: Tensor) -> Tensor:
    """A gate's log decays in the accumulation dtype, [batch, seq, heads, 1 or key_dim]."""
    gates = log_decay.to(accumulation_dtype(k.dtype))
    return gates if gates.dim() == 4 else gates[..., None]


def _times(log_decay: Tensor, count: Tensor, k: Tensor) -> Tensor:
    """count x log_decay, [1, seq, heads, 1]; 0 x -inf is 0."""
    dtype = accumulation_dtype(k.dtype)
    product = count.to(dtype)[:, None] * log_decay.to(dtype)
    return torch.where(count[:, None] == 0, 0.0, product)[None, ..., None]


def _decay_to(log_decay: Tensor | None, k: Tensor, *, including: bool) -> Tensor | None:
    """log of the decay from before the first token to each token, broadcastable to k.

    ``including`` counts the token's own; without it the sum ends before the token.
    """
    if log_decay is None:
        return None
    if log_decay.dim() == 1:
        return _times(log_decay, torch.arange(k.shape[1], device=k.device) + including, k)
    gates = _per_token(log_decay, k)
    if not including:
        gates = torch.cat([torch.zeros_like(gates[:, :1]), gates[:, :-1]], 1)
    return gates.cumsum(1)


def _decay_from(log_decay: Tensor | None, k: Tensor, *, reverse: bool) -> Tensor | None:
    """log of the decay from behind each token to the last (reverse: the first) one."""
    if reverse or log_decay is None:
        return _decay_to(log_decay, k, including=False)
    if log_decay.dim() == 1:
        return _times(log_decay, torch.arange(k.shape[1] - 1, -1, -1, device=k.device), k)
    # Summed from the end: a difference of two sums would lose digits, and -inf - -inf is NaN.
    flipped = _decay_to(log_decay.flip(1), k, including=False)
    return None if flipped is None else flipped.flip(1)


def _total(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """log of the decay of all tokens together, [batch, heads, 1 or key_dim]."""
    dtype = accumulation_dtype(k.dtype)
    if log_decay is None:
        return k.new_zeros(k.shape[0], k.shape[2], 1, dtype=dtype)
    if log_decay.dim() == 1:
        count = torch.full((1,), k.shape[1], device=k.device)
        return _times(log_decay, count, k)[:, 0].expand(k.shape[0], -1, -1)
    return _per_token(log_decay, k).sum(1)


def _write(k: Tensor, log_decay: Tensor | None, v: Tensor) -> Tensor:
    """sum_j exp(log_decay_j) k_j^T v_j, [batch, heads, key_dim, value_dim], accumulation dtype."""
    weighted = k if log_decay is None else k * log_decay.exp()
    return _product(weighted.to(k.dtype) if _on_tensor_cores(k) else weighted, v)


def _read(q: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """(exp(log_decay_i) q_i) S of each token, [batch, seq, heads, value_dim] in q's dtype."""
    dtype = q.dtype if _on_tensor_cores(q) else state.dtype
    grouped = q.unflatten(2, (state.shape[1], -1))
    if log_decay is not None:
        grouped = grouped * log_decay[:, :, :, None].exp()
    out = torch.einsum("bshgk,bhkv->bshgv", grouped.to(dtype), state.to(dtype))
    return out.flatten(2, 3).to(q.dtype)


def _on_tensor_cores(x: Tensor) -> bool:
    """Whether 16-bit products are summed in float32, as the kernels do."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b over seq, [batch, heads, key_dim, value_dim], in the accumulation dtype."""
    if _on_tensor_cores(b):
        return _HalfProduct.apply(a, b)
    dtype = accumulation_dtype(b.dtype)
    return torch.einsum("bshk,bshv->bhkv", a.to(dtype), b.to(dtype))


class _HalfProduct(torch.autograd.Function):
    """a^T b of 16-bit tensors, [batch, seq, heads, dim] each, whose sums stay float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        left, right = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))
        product = torch.bmm(left.mT, right, out_dtype=torch.float32)
        return product.unflatten(0, (a.shape[0], a.shape[2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        grad_a = torch.einsum("bshv,bhkv->bshk", b, grad)
        return grad_a, torch.einsum("bshk,bhkv->bshv", a, grad)
