"""Errors of the constant-decay kernels on a GPU against float64: the grid, and hard combinations."""

import pytest
import torch
from kernel_cases import FORM
from kernel_grid import (
    BF16,
    FP16,
    FP32,
    Call,
    Case,
    assert_results_close,
    check,
    covering_grid,
    exact_results,
    run,
)

from transnormer.ops import linear_attention

pytestmark = pytest.mark.gpu
GPU = "cuda"

# Where others are wrong, and where a kernel's own forms meet: ragged tails at strong decay, many
# segments, segments behind the end, the widest heads, states in every flavour.
HARD = [
    *(Case((128, 128), 131_072, decay=decay, heads=4) for decay in ("none", "first", "last")),
    Case((128, 128), 131_072, decay="mixed", heads=5, state=True, reverse=True),
    Case((64, 64), 131_072, decay="1e-6", heads=2, layout="packed", state=True),
    Case((128, 128), 131_072, FP16, decay="last", heads=2, scale=128**-0.5),
    Case((64, 64), 131_072, FP32, decay="last", heads=2),
    Case((64, 128), 131_072, FP32, decay="first", heads=2, state=True),
    # One head more than fits: the last segments start behind the last token.
    *(Case((64, 64), 32_769, dtype, decay="last", heads=1, state=True) for dtype in (BF16, FP32)),
    Case((64, 64), 33_000, decay="last", heads=1, state=True, reverse=True),
    Case((256, 512), 4097, decay="last", layout="packed", state=True, reverse=True),
    Case((256, 512), 4097, FP32, decay="mixed", layout="packed", grouped=True, state=True),
    Case((256, 512), 1000, FP16, decay="none", layout="many"),
    Case((64, 428), 4097, decay="first", grouped=True, state=True),
    Case((192, 96), 4097, FP16, decay="mixed", state=True, scale=0.07),
    Case((96, 192), 4097, decay="mixed", reverse=True, grouped=True, state=True),
    *(Case((128, 128), seq, decay="paper", heads=32, state=True) for seq in (65, 100)),
    *(Case((128, 128), 100, dtype, decay="paper", heads=32) for dtype in (FP16, FP32)),
    *(Case((64, 64), seq, decay="first", heads=32, state=True) for seq in (16, 17, 31, 33)),
    Case((128, 64), 8192, decay="first", heads=16),
    Case((128, 64), 8191, decay="first", heads=16, layout="packed"),
    Case((16, 512), 257, decay="mixed", state=True),
    Case((256, 16), 257, FP32, decay="mixed", state=True),
    Case((252, 508), 257, decay="mixed", state=True),
]


@pytest.mark.parametrize("case", covering_grid(), ids=lambda case: case.id)
def test_grid(case: Case) -> None:
    check(case, GPU)


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.id)
def test_hard_combinations(case: Case) -> None:
    check(case, GPU)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("decay", [-9.0, -12.0, -20.0, -87.0, -95.0, -103.0, -104.0])
@pytest.mark.parametrize("seq", [3, 100])
def test_a_head_alone_whose_state_fades_at_once(seq: int, decay: float, dtype: torch.dtype) -> None:
    # Alone, since beside heads that remember its gradients would not show; scaled, since a
    # gradient below float32's range may be 0.
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, seq, *shape, device=GPU).to(dtype)

    state = torch.randn(1, 1, 64, 64, device=GPU)
    log_decay = torch.tensor([decay], device=GPU)
    call = Call(draw(1, 64), draw(1, 64), draw(1, 64), log_decay, state, None, draw(1, 64), state)
    actual, exact = run(call, FORM), exact_results(call)
    if decay < -80:
        for name in ("gradient of initial_state", "gradient of log_decay"):
            assert bool(torch.isfinite(actual.pop(name)).all())
            exact.pop(name)
    assert_results_close(actual, exact, dtype, seq)


def test_uneven_documents() -> None:
    lengths = torch.randint(1, 4000, (32,))
    lengths = (lengths * 65_536 / lengths.sum()).long().clamp(min=1)
    lengths[-1] += 65_536 - lengths.sum()
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(GPU)
    q, k, v, do = (torch.randn(1, 65_536, 4, 128, device=GPU, dtype=BF16) for _ in range(4))
    state, d_final = (torch.randn(32, 4, 128, 128, device=GPU) for _ in range(2))
    log_decay = torch.tensor([-0.5, -0.004, -1e-5, 0.0], device=GPU)
    call = Call(q, k, v, log_decay, state, bounds, do, d_final)
    assert_results_close(run(call, FORM), exact_results(call), BF16, 256)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_more_rows_than_a_grid_axis_takes(packed: bool) -> None:
    rows = 70_000
    shape = (1, rows, 1, 16) if packed else (rows, 1, 1, 16)
    q, k, v, do = (torch.randn(shape, device=GPU) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    bounds = torch.arange(rows + 1, device=GPU) if packed else None
    log_decay = torch.tensor([-0.1], device=GPU)
    o, final_state = linear_attention(q, k, v, log_decay, cu_seqlens=bounds, implementation=FORM)
    grads = torch.autograd.grad(o, (q, k, v), do)
    # One token sees itself alone.
    q, k, v, do = (x.detach().double() for x in (q, k, v, do))
    score, d_score = (q * k).sum(-1, keepdim=True), (do * v).sum(-1, keepdim=True)
    exact = {"o": score * v, "q": d_score * k, "k": d_score * q, "v": score * do}
    for (name, x), y in zip(exact.items(), (o, *grads)):
        error = (y.double() - x).norm() / x.norm()
        assert error <= 1e-5, f"{name}: {error}"
    state = k.view(rows, 1, 16, 1) * v.view(rows, 1, 1, 16)
    assert (final_state.double() - state).norm() <= 2e-6 * state.norm()
