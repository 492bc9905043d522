"""What the layers are told of a step, without an engine: new sequences, slots, padding."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# vLLM and what it imports warn.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BLOCKS = 8


def builder() -> tuple[Any, torch.Tensor]:
    """A builder for one layer, and the layer's states, all ones."""
    pool = torch.ones(BLOCKS, 2, 3)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=None,
            static_forward_context={"layer": SimpleNamespace(pool=pool)},
        ),
    )
    backend = import_module("transnormer.integrations.vllm.backend")
    cpu = torch.device("cpu")
    return backend.SlotMetadataBuilder(None, ["layer"], config, cpu), pool


def step(rows: list[tuple[int, int, int]]) -> Any:
    """What vLLM says of rows (tokens of this step, length with them, block)."""
    tokens, lengths, blocks = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
    starts = torch.cat([tokens.new_zeros(1), tokens.cumsum(0, dtype=torch.int32)])
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        block_table_tensor=blocks[:, None],
        num_reqs=len(rows),
        # As vLLM counts where it pads: with the padding.
        num_actual_tokens=max(int(tokens.sum()), len(rows)),
        max_query_len=int(tokens.max()),
    )


def test_states_of_new_sequences_are_cleared_and_no_others() -> None:
    build, pool = builder()
    # A decode, a prompt of one token, the rest of a prompt, a prompt.
    made = build.build(0, step([(1, 10, 3), (1, 1, 5), (8, 40, 2), (6, 6, 7)]))
    assert made.slots.tolist() == [3, 5]
    assert made.slots.dtype == torch.int32
    assert made.read_slots.tolist() == [2, 7]
    assert made.read_bounds.tolist() == [0, 8, 14]
    assert made.num_tokens == 16
    assert [i for i in range(BLOCKS) if not pool[i].any()] == [5, 7]
    assert pool.sum() == (BLOCKS - 2) * 6


def test_rows_that_pad_a_graph_have_no_slot() -> None:
    build, pool = builder()
    first = build.build(0, step([(1, 10, 3), (1, 7, 4), (0, 0, 0), (0, 0, 0)]))
    assert first.num_decodes == 4
    assert first.slots.tolist() == [3, 4, -1, -1]
    assert first.num_tokens == 4
    again = build.build(0, step([(1, 11, 3), (1, 8, 6)]))
    assert again.slots.tolist() == [3, 6]
    # A captured graph reads what it read when it was captured.
    assert again.slots.data_ptr() == first.slots.data_ptr()
    assert pool.all()
