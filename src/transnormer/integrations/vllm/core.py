"""Linear attention over states that lie in vLLM's cache."""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from transnormer.integrations.vllm.backend import SlotBackend, SlotMetadata
from transnormer.integrations.vllm.support import StateShape
from transnormer.nn.core import LinearAttentionCore
from transnormer.ops import linear_attention, linear_attention_step
from transnormer.ops.checks import accumulation_dtype

STATE_DTYPE = torch.float32


class CachedState(MambaBase):
    """One state a sequence, [heads, head_dim, head_dim] in float32, which vLLM allocates and copies.

    vLLM knows a layer of a model as one of these. A layer whose keys LRPE doubles has two, the
    upper and the lower half of its state, so that all states have one shape.
    """

    def __init__(self, name: str, shape: StateShape, layers: dict[str, Any]) -> None:
        if name in layers:
            raise ValueError(f"{name} names two states; expected a prefix of its own for a model")
        self.name, self._shape = name, (shape.heads, shape.head_dim, shape.head_dim)
        self.kv_cache = (torch.empty(0),)
        layers[name] = self

    @property
    def pool(self) -> Tensor:
        """The states of all sequences, [blocks, heads, head_dim, head_dim]."""
        return self.kv_cache[0]

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of state, by which vLLM finds what to copy."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a sequence's states: one."""
        return (self._shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """float32, whatever the model's dtype is."""
        return (STATE_DTYPE,)

    def get_attn_backend(self) -> type[SlotBackend]:
        """Who describes a step to this layer."""
        return SlotBackend


class CachedCore(LinearAttentionCore):
    """``LinearAttentionCore`` whose states lie in vLLM's cache, for one layer.

    Tokens of all sequences of a step come as one row, [1, tokens, heads, key_dim]. Sequences with
    one new token advance in their slots; those with more are read in one packed call and their
    states written back.

    Args:
        core: what this takes the place of.
        states: where the state is; several hold parts of the keys, in order, and their outputs
            add up: q S = q_1 S_1 + q_2 S_2.
    """

    def __init__(self, core: LinearAttentionCore, states: list[CachedState]) -> None:
        super().__init__(implementation=core.implementation)
        self.states = states

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """o, [1, tokens, heads, value_dim]; the states are where they were."""
        assert state is None
        assert cu_seqlens is None
        assert mask is None
        steps = get_forward_context().attn_metadata
        if steps is None:
            # vLLM measures the memory of a pass before there is a cache.
            run = linear_attention(q, k, v, log_decay, implementation=self.implementation)
            return run[0], None
        step = steps[self.states[0].name]
        assert isinstance(step, SlotMetadata)
        ahead, end = step.num_decodes, step.num_tokens
        parts = []
        if ahead:
            parts.append(self._advance(q[0, :ahead], k[0, :ahead], v[0, :ahead], log_decay, step))
        if end > ahead:
            now = slice(ahead, end)
            parts.append(self._read(q[:, now], k[:, now], v[:, now], log_decay, step))
        if q.shape[1] > end:
            parts.append(torch.zeros_like(v[:, end:]))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], None

    def _advance(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, step: SlotMetadata
    ) -> Tensor:
        """One token of each sequence, [sequences, heads, dim] -> [1, sequences, heads, dim]."""
        if len(self.states) == 1:
            pool = self.states[0].pool
            return linear_attention_step(q, k, v, log_decay, pool, slots=step.slots)[0][None]
        # The sum of the parts is rounded once, as that of one state is.
        wide = accumulation_dtype(q.dtype)
        value = v.to(wide)
        halves = zip(*(x.to(wide).chunk(len(self.states), -1) for x in (q, k)), strict=True)
        outputs = [
            linear_attention_step(q_, k_, value, log_decay, state.pool, slots=step.slots)[0]
            for (q_, k_), state in zip(halves, self.states, strict=True)
        ]
        return torch.stack(outputs).sum(0).to(q.dtype)[None]

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, step: SlotMetadata
    ) -> Tensor:
        """The next tokens of sequences, packed, [1, tokens, heads, dim]."""
        slots = step.read_slots
        before = torch.cat([state.pool[slots] for state in self.states], 2)
        o, after = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=before,
            cu_seqlens=step.read_bounds,
            implementation=self.implementation,
        )
        for state, part in zip(self.states, after.chunk(len(self.states), 2), strict=True):
            state.pool[slots] = part
        return o
