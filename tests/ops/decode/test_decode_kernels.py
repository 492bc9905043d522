"""Kernels of a decoding step against their formulas; the model as a whole is in test_fused."""

import math

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import OUTPUT, assert_close


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_likeliest_token_is_found_below_the_limit(dtype: torch.dtype) -> None:
    from transnormer.ops.decode import triton_pointwise as kernels

    logits = torch.randn(7, 9_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[1, 8_999], logits[2, 4_096], logits[3, [17, 4_100]] = 50.0, 60.0, 70.0
    logits[4, 5_000], logits[5, 8_000], logits[6] = math.nan, math.inf, -math.inf
    for limit in (None, 8_999, 4_096, 3):
        tokens, bad = kernels.best(logits, limit, overlap=False).tolist()
        part = logits[:4, :limit]
        assert tokens[:4] == part.argmax(-1).tolist()
        assert bad[:4] == [0] * 4
        seen = [True, True, True] if limit in (None, 8_999) else [False, False, True]
        assert [bool(x) for x in bad[4:]] == seen


@needs_interpreter
@pytest.mark.parametrize("scaled", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("inputs", [40, 1030])
def test_a_row_is_normed_gated_multiplied_and_added(inputs: int, scaled: bool) -> None:
    """In one tile, and in two of which the last is hardly filled."""
    from transnormer.ops.decode import triton_projection as kernels

    generator = torch.Generator().manual_seed(5)
    x, u, y = (torch.randn(1, n, generator=generator) for n in (inputs, inputs, 70))
    weight, scales = torch.randn(70, inputs, generator=generator), None
    if scaled:
        weight = (weight * 40).round().clamp(-128, 127).to(torch.int8)
        scales = torch.rand(70, 1, generator=generator)
    matrix = weight.double() * (1.0 if scales is None else scales.double())
    normed = x.double() / (x.double().square().mean() + 0.25).sqrt()
    exact = y.double() + normed * u.double().sigmoid() @ matrix.T
    made = kernels.project(
        x, kernels.Matrix(weight, scales), gate=u, gate_activation="sigmoid", eps=0.25, residual=y
    )
    assert made is y
    assert_close(made, exact, limit=4 * OUTPUT[torch.float32])


@needs_interpreter
@pytest.mark.parametrize("rows", [2, 17])
def test_rows_have_the_product_of_two_matrices(rows: int) -> None:
    from transnormer.ops.decode import triton_projection as kernels

    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, 150, generator=generator).bfloat16()
    first, second = (torch.randn(37, 150, generator=generator).bfloat16() for _ in range(2))
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    gate, up = normed @ first.double().T, normed @ second.double().T
    made = kernels.project_rows(x, first, second=second, eps=0.5, activation="silu")
    # Three roundings, which the interpreter cuts off.
    assert_close(made, torch.nn.functional.silu(gate) * up, limit=2 * OUTPUT[torch.bfloat16])


@needs_interpreter
def test_a_state_decays_and_takes_up_a_token() -> None:
    """Decays near 1, which are added in two parts, and far from it."""
    from transnormer.ops.decode import triton_pointwise as kernels

    heads, dim = 3, 12
    state, where = torch.randn(2, heads, dim, dim), torch.zeros(1, dtype=torch.int64)
    qkvu, g = torch.randn(1, 4 * heads * dim), torch.tensor([-0.01, -0.7, -3.0])
    q, k, v, _ = qkvu.double().view(4, heads, dim)
    q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    exact = g.double().exp()[:, None, None] * state[1].double() + k[:, :, None] * v[:, None]
    slots = torch.tensor([1], dtype=torch.int32)
    o = kernels.mix(qkvu, where, None, g, state, slots, heads, "silu", "none", overlap=False)
    assert_close(state[1], exact)
    assert_close(o[0], (q[:, None] @ exact).flatten())


@needs_interpreter
def test_a_slot_outside_the_pool_shows_and_touches_nothing() -> None:
    from transnormer.ops.decode import triton_pointwise as kernels

    state, where = torch.randn(3, 2, 16, 16), torch.zeros(4, dtype=torch.int64)
    qkvu, before = torch.randn(4, 4 * 32), state.clone()
    slots = torch.tensor([1, -1, 3, -2], dtype=torch.int32)
    o = kernels.mix(
        qkvu,
        where,
        None,
        torch.tensor([-0.5, -2.0]),
        state,
        slots,
        2,
        "silu",
        "none",
        overlap=False,
    )
    assert torch.isfinite(o[0]).all()
    assert torch.equal(o[1], torch.zeros(32))
    assert torch.isnan(o[2:]).all()
    assert torch.equal(state[[0, 2]], before[[0, 2]])
    assert not torch.equal(state[1], before[1])
