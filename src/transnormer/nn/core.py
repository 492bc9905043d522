"""The parameter-free seam between a mixer's projections and the op.

Everything that must exchange states between ranks replaces this module and nothing else.
"""

from typing import Any

from torch import Tensor, nn

from transnormer.nn.state import SlotState
from transnormer.ops import linear_attention, linear_attention_step
from transnormer.ops.checks import accumulation_dtype, no_autocast
from transnormer.ops.joint_attention import joint_attention


class LinearAttentionCore(nn.Module):
    """Linear attention with decay as a module: training, prefill and decode are the same call.

    Args:
        causal: False sums over both directions, the diagonal once; it has no state.
        implementation: of ``linear_attention``.
    """

    def __init__(self, *, causal: bool = True, implementation: str = "auto") -> None:
        super().__init__()
        self.causal, self.implementation = causal, implementation

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        state: Tensor | SlotState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """Mix along seq.

        Args:
            q: [batch, seq, heads, key_dim].
            k: [batch, seq, kv_heads, key_dim].
            v: [batch, seq, kv_heads, value_dim].
            log_decay: any form of ``linear_attention``'s.
            state: [batch or num_sequences, kv_heads, key_dim, value_dim] or None; or rows of a pool,
                to be advanced in place by a few tokens (no cu_seqlens, no mask).
            cu_seqlens: bounds of packed sequences.
            mask: bool [batch, seq]; a False token neither adds to the state nor decays it.

        Returns:
            o, [batch, seq, heads, value_dim], and the new state (None where not causal).
        """
        if isinstance(state, SlotState):
            assert cu_seqlens is None
            assert mask is None
            return state.step(q, k, v, log_decay), state
        implementation = self.implementation
        if mask is not None:
            k, log_decay = without_pads(k, log_decay, mask)
            if log_decay is not None:
                # Pads make constant decay a gate, which not every implementation has.
                implementation = "auto"
        if not self.causal:
            return bidirectional(q, k, v, log_decay, cu_seqlens, implementation), None
        one_token = state is not None and q.shape[1] == 1 and cu_seqlens is None
        if one_token and implementation in ("auto", "chunked"):
            return linear_attention_step(q, k, v, log_decay, state)
        return linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            implementation=implementation,
        )

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
        """All between the projections of a released layer as one op; None where this core cannot.

        Arguments as ``joint_attention``'s. Without states, pads and both directions: those need
        ``forward``.
        """
        # Whoever keeps states or tokens elsewhere has a ``forward`` that this would pass by.
        if type(self) is not LinearAttentionCore:
            return None
        return joint_attention(
            projected,
            log_decay,
            head_dim=head_dim,
            eps=eps,
            cu_seqlens=cu_seqlens,
            implementation=implementation,
        )

    def flops_per_token(self, heads: int, key_dim: int, value_dim: int, context: int) -> float:
        """Operations of a token, in blocks of B = min(key_dim, value_dim) tokens.

        Scores and values within the block, the product with the state, and its update:
        heads (2 B (key_dim + value_dim) + 4 key_dim value_dim), as Shen et al. 2024
        (arXiv:2406.16690, table 2) count; twice that without causality, which is two such sweeps.
        """
        block = min(key_dim, value_dim, context)
        once = heads * (2.0 * block * (key_dim + value_dim) + 4.0 * key_dim * value_dim)
        return once if self.causal else 2.0 * once


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    implementation: str,
    states: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Both directions with the diagonal once, each in the inputs' dtype, summed in the accumulation
    dtype; ``states`` stand before the first token and behind the last one."""
    groups, dtype = q.shape[2] // k.shape[2], q.dtype
    ahead, back = (
        linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            implementation=implementation,
        )[0]
        for reverse, state in zip((False, True), states, strict=True)
    )
    with no_autocast(q.device.type):
        ahead, back, q, k, v = (x.to(accumulation_dtype(x.dtype)) for x in (ahead, back, q, k, v))
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        own = (q * k).sum(-1, keepdim=True) * v
        return (ahead + back - own).to(dtype)


def without_pads(k: Tensor, log_decay: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """k and log_decay with 0 at masked tokens; a constant decay becomes [batch, seq, kv_heads]."""
    k = k.masked_fill(~mask[..., None, None], 0.0)
    if log_decay is None:
        return k, None
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(*mask.shape, -1)
    shape = (*mask.shape, *[1] * (log_decay.dim() - 2))
    return k, log_decay.masked_fill(~mask.view(shape), 0.0)
