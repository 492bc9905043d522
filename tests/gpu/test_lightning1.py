"""The kernels of quadratic tiles on a GPU against float64, and what the name runs there."""

import pytest
import torch
from kernel_grid import (
    BF16,
    FP16,
    FP32,
    Case,
    assert_results_close,
    exact_results,
    make_call,
    run,
)

from transnormer.ops import linear_attention
from transnormer.ops.linear_attention.lightning1_ops import runs_kernels

pytestmark = pytest.mark.gpu
GPU = "cuda"
FORM = "lightning1"
# Tokens of a tile of queries.
TILE = 128

CASES = [
    *(Case((128, 128), 1000, dtype, decay="first", state=True) for dtype in (BF16, FP16, FP32)),
    *(Case((64, 64), 4097, dtype, decay="mixed", grouped=True) for dtype in (BF16, FP16, FP32)),
    *(Case((128, 128), seq, decay="last", state=True) for seq in (1, 63, 127, 128, 129, 257)),
    Case((128, 128), 8192, decay="none", layout="few"),
    Case((128, 128), 4097, decay="mixed", layout="packed", state=True),
    Case((64, 128), 4097, decay="first", layout="packed", state=True, reverse=True),
    Case((128, 64), 1000, decay="paper", layout="many", reverse=True, state=True),
    Case((96, 192), 1000, FP16, decay="mixed", reverse=True, grouped=True, state=True),
    Case((20, 16), 257, decay="last", state=True, scale=0.07),
    Case((256, 512), 1000, decay="first", grouped=True, state=True),
    Case((256, 512), 1000, FP32, decay="mixed", layout="packed", state=True),
    Case((256, 128), 1000, FP16, decay="inf", state=True),
    Case((192, 96), 1000, FP32, decay="30", state=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_result_is_close_to_float64(case: Case) -> None:
    call = make_call(case, GPU)
    arguments = {"scale": case.scale, "reverse": case.reverse}
    actual = run(call, FORM, **arguments)
    assert_results_close(actual, exact_results(call, **arguments), case.dtype, TILE)


def test_the_name_runs_kernels_on_a_gpu() -> None:
    device = torch.device(GPU)
    assert runs_kernels(device, BF16, 128, 128)
    assert not runs_kernels(device, torch.float64, 128, 128)
    q = torch.randn(1, 64, 1, 16, device=GPU)
    with torch.profiler.profile(acc_events=True) as profile:
        linear_attention(q, q, q, implementation=FORM)
        torch.cuda.synchronize()
    assert any("quadratic_kernel" in event.name for event in profile.events())


def test_memory_is_linear_in_length() -> None:
    peaks = []
    for seq in (4096, 8192):
        q, k, v, do = (torch.randn(1, seq, 8, 128, device=GPU, dtype=BF16) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, _ = linear_attention(*leaves, implementation=FORM)
        torch.autograd.grad(o, leaves, do)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del o
    assert peaks[1] <= 2.2 * peaks[0]
