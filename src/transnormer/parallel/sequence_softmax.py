"""Softmax attention over sequences that are cut into parts, one a rank.

It replaces the parameter-free core of the mixer. While no part is set it is that core.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.nn.softmax_attention import SoftmaxAttentionCore
from transnormer.nn.state import KVState
from transnormer.ops.checks import accumulation_dtype
from transnormer.parallel.sequence_part import SequenceAxis, SequencePart
from transnormer.parallel.state_exchange import Chain


class SequenceSoftmaxCore(SoftmaxAttentionCore):
    """Softmax attention over a sequence whose parts lie on the ranks of a chain.

    Keys and values of all parts are gathered, and each part's queries look at those of their own
    sequence (the hybrids of Sun et al. 2025, arXiv:2502.07563, and of Llama 3, arXiv:2407.21783,
    section 3.3.2). Memory for keys and values is that of the whole sequence.
    """

    def __init__(self, core: SoftmaxAttentionCore, axis: SequenceAxis) -> None:
        super().__init__(causal=core.causal)
        self.axis = axis

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: KVState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, KVState | None]:
        """As ``SoftmaxAttentionCore.forward``, on this rank's part.

        Raises:
            NotImplementedError: a state goes in, or one of packed sequences is wanted.
        """
        run = super().forward if self.axis.part is None else self.in_parts
        return run(q, k, v, state=state, cu_seqlens=cu_seqlens, mask=mask, keep_state=keep_state)

    def in_parts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: KVState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, KVState | None]:
        """``forward`` where a part is set."""
        part = self.axis.part
        assert part is not None
        keeps = keep_state and self.causal
        if state is not None or (keeps and part.packed):
            raise NotImplementedError(
                "softmax attention over parts of sequences takes no state, and returns none of "
                "packed ones; expected whole sequences of which the loss is wanted"
            )
        k, v, keys, values = _gather_parts(self.axis.chain, part, k, v)
        outputs = []
        # The first and the last sequence reach beyond the part, and may be the same.
        pieces = sorted({(0, part.first_end), (part.last_start, q.shape[1])})
        inner = slice(part.first_end, part.last_start)
        final = None
        for begin, end in pieces:
            piece = slice(begin, end)
            past = self._beyond(keys, values, part, begin == 0, end == q.shape[1])
            o, final = super().forward(
                q[:, piece], k[:, piece], v[:, piece], state=past, cu_seqlens=None,
                mask=None if mask is None else mask[:, piece], keep_state=keep_state,
            )  # fmt: skip
            outputs.append(o)
            if begin == 0 and inner.stop > inner.start:
                assert cu_seqlens is not None
                o, _ = super().forward(
                    q[:, inner], k[:, inner], v[:, inner], state=None,
                    cu_seqlens=cu_seqlens[1:-1] - cu_seqlens[1],
                    mask=None if mask is None else mask[:, inner], keep_state=False,
                )  # fmt: skip
                outputs.append(o)
        return torch.cat(outputs, 1), final

    def _beyond(
        self, keys: Tensor, values: Tensor, part: SequencePart, first: bool, last: bool
    ) -> KVState | None:
        """What the part's first or last sequence sees in other parts; None for nothing."""
        before = slice(part.start - part.history, part.start) if first else slice(0)
        behind = slice(part.end, part.end + part.future) if last and not self.causal else slice(0)
        seen = [torch.cat([x[:, before], x[:, behind]], 1) for x in (keys, values)]
        if not seen[0].shape[1]:
            return None
        valid = seen[0].new_ones(seen[0].shape[:2], dtype=torch.bool)
        if part.mask is not None:
            valid = torch.cat([part.mask[:, before], part.mask[:, behind]], 1)
            # Not only hidden: 0 x infinity cannot be.
            seen = [x.masked_fill(~valid[..., None, None], 0.0) for x in seen]
        return KVState(seen[0], seen[1], valid)


def _gather_parts(
    chain: Chain, part: SequencePart, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v unchanged, and those of all parts one after the other, [batch, total, heads, dim]."""
    longest, own = max(part.lengths), k.shape[1]
    both = torch.cat([k, v], -1)
    padded = torch.cat([both, both.new_zeros(k.shape[0], longest - own, *both.shape[2:])], 1)
    gathered = _AllGather.apply(padded, chain)
    rows = [x[:, :length] for x, length in zip(gathered, part.lengths, strict=True)]
    keys, values = torch.cat(rows, 1).split([k.shape[-1], v.shape[-1]], -1)
    # The gradient of this rank's own must start the exchange on every rank, also the first.
    tie = gathered.flatten()[:0].sum().to(k.dtype)
    return k + tie, v, keys, values


class _AllGather(torch.autograd.Function):
    """x of every rank, [ranks, ...]; the gradient of each is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain) -> Tensor:
        ctx.chain, ctx.dtype = chain, x.dtype
        gathered = x.new_empty(chain.size, *x.shape)
        dist.all_gather(list(gathered), x.contiguous(), group=chain.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        chain = ctx.chain
        # 16-bit gradients of many ranks are summed in float32.
        grad = grad.to(accumulation_dtype(grad.dtype)).contiguous()
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(own, list(grad), group=chain.group)
        return own.to(ctx.dtype), None
