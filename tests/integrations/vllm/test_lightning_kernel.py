"""Why vLLM's own kernel for lightning attention is not used."""

from pathlib import Path

import pytest
import tolerances
import torch
from vllm_cases import TESTS, child

from transnormer.ops import linear_attention

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

# Its blocks; what comes from earlier blocks is one decay short.
BLOCK = 256


def test_vllms_kernel_decays_history_one_step_too_few(tmp_path: Path) -> None:
    """vLLM 0.32: o = intra + exp(slope) inter, where intra + inter is right; its state is right.

    If this fails with a later vLLM because the outputs are right, the note in docs/vllm.md is old.
    """
    file = tmp_path / "result.pt"
    done = child(str(TESTS / "vllm_kernel_case.py"), str(file), TRITON_INTERPRET="1")
    assert file.is_file(), done.stderr
    result = {name: x.double() for name, x in torch.load(file).items()}
    q, k, v = (result[name] for name in "qkv")
    log_decay, o = -result["slopes"], result["o"]
    exact, state = linear_attention(q, k, v, log_decay, implementation="reference")
    close = tolerances.KERNEL_OUTPUT[torch.float32]
    tolerances.assert_close(result["state"], state, limit=close)
    tolerances.assert_close(o[:, :BLOCK], exact[:, :BLOCK], limit=close)

    late = [x[:, BLOCK:] for x in (q, k, v)]
    intra, _ = linear_attention(*late, log_decay, implementation="reference")
    inter = exact[:, BLOCK:] - intra
    off_by_one = intra + (-log_decay).exp()[:, None] * inter
    tolerances.assert_close(o[:, BLOCK:], off_by_one, limit=close)
    first = (o[:, BLOCK] - exact[:, BLOCK]).norm(dim=-1) / exact[:, BLOCK].norm(dim=-1)
    # All that the first token of a block knows of others is history: exp(slope) - 1, nearly.
    assert first[0, 0] > 0.5
    assert first[0, 1] > 0.015
