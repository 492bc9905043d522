"""The layer over vLLM's cache, without an engine: one step of a scheduler, any dtype."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from transnormer.ops import decay, linear_attention

# vLLM and what it imports warn.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HEADS, DIM, BLOCKS = 3, 16, 9
# Two sequences with one token, a row of padding, two prompts, and two tokens of padding.
SLOTS, READ_SLOTS, BOUNDS, TOKENS = [4, 2, -1], [7, 1], [0, 5, 42], 47


def step_of(part: Any) -> Any:
    """The metadata of the step above."""
    fields = dict.fromkeys(
        ("num_prefill_tokens", "num_decode_tokens", "query_start_loc", "seq_lens"), 0
    )
    return part.SlotMetadata(
        **fields,
        num_prefills=len(READ_SLOTS),
        num_decodes=len(SLOTS),
        state_indices_tensor=torch.empty(0),
        slots=torch.tensor(SLOTS, dtype=torch.int32),
        read_slots=torch.tensor(READ_SLOTS),
        read_bounds=torch.tensor(BOUNDS, dtype=torch.int32),
        num_tokens=len(SLOTS) + BOUNDS[-1],
    )


def expected(q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence of the step alone, in float64: outputs, 0 for padding, and all states."""
    o, after = torch.zeros(v.shape, dtype=torch.float64), states.double().clone()
    starts = [(row, 1, slot) for row, slot in enumerate(SLOTS) if slot >= 0]
    starts += [(len(SLOTS) + a, b - a, slot) for a, b, slot in zip(BOUNDS, BOUNDS[1:], READ_SLOTS)]
    for start, count, slot in starts:
        now = slice(start, start + count)
        o[:, now], state = linear_attention(
            *(x[:, now].double() for x in (q, k, v)),
            g.double(),
            initial_state=after[slot : slot + 1].clone(),
            implementation="reference",
        )
        after[slot] = state[0]
    return o, after


@pytest.mark.parametrize("parts", [1, 2], ids=["one state", "two states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_reads_and_writes_the_states_of_its_slots_alone(
    parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = import_module("transnormer.integrations.vllm.core")
    backend = import_module("transnormer.integrations.vllm.backend")
    support = import_module("transnormer.integrations.vllm.support")
    shape = support.StateShape(parts, HEADS, DIM)
    layers: dict[str, Any] = {}
    cached = [core.CachedState(f"layer.0.state{i}", shape, layers) for i in range(parts)]
    before = torch.randn(BLOCKS, HEADS, parts * DIM, DIM)
    for state, part in zip(cached, before.chunk(parts, 2), strict=True):
        # As vLLM has it: pages of bytes with the states of other layers between them.
        pages = torch.zeros(BLOCKS, 2, HEADS * DIM * DIM * 4, dtype=torch.int8)[:, 0]
        state.bind_kv_cache(pages[:, None, None])
        state.pool.copy_(part)
    layer = core.CachedCore(core.LinearAttentionCore(), cached)
    steps = {"layer.0.state0": step_of(backend)}
    monkeypatch.setattr(core, "get_forward_context", lambda: SimpleNamespace(attn_metadata=steps))

    shapes = [(1, TOKENS, HEADS, parts * DIM)] * 2 + [(1, TOKENS, HEADS, DIM)]
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    g = decay.tnl_log_decay(HEADS, 1, 4)
    o, _ = layer(q, k, v, g)
    exact, after = expected(q, k, v, g, before)
    assert o.dtype == dtype
    tolerances.assert_close(o, exact, limit=tolerances.OUTPUT[dtype])
    pool = torch.cat([state.pool for state in cached], 2)
    assert pool.dtype == torch.float32
    tolerances.assert_close(pool, after, limit=tolerances.STATE[dtype])
    others = [i for i in range(BLOCKS) if i not in SLOTS + READ_SLOTS]
    assert torch.equal(pool[others], before[others])
