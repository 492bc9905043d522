"""Kernels of a decoding step against their formulas; the model as a whole is in test_fused."""

import math

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import OUTPUT, assert_close
from torch import Tensor

from transnormer.ops import RingState
from transnormer.ops.decode.tiles import RowsTile


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
    arrived = torch.zeros(3, dtype=torch.int32)
    made = kernels.project_rows(
        x, first, second=second, eps=0.5, activation="silu", arrived=arrived
    )
    # Three roundings, which the interpreter cuts off.
    assert_close(made, torch.nn.functional.silu(gate) * up, limit=2 * OUTPUT[torch.bfloat16])


@needs_interpreter
@pytest.mark.parametrize(
    ("outputs", "inputs", "tile"),
    [(64, 256, RowsTile(64, 64, 4, 3, 4, 64)), (37, 200, RowsTile(16, 64, 3, 3, 4, 0))],
    ids=["even", "uneven"],
)
def test_a_sum_in_parts_is_the_sum(outputs: int, inputs: int, tile: RowsTile) -> None:
    """The last program of a block sums them, and leaves the counts as they were."""
    from transnormer.ops.decode import triton_projection as kernels

    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(5, n, generator=generator).bfloat16() for n in (inputs, outputs))
    first, second = (torch.randn(outputs, inputs, generator=generator).bfloat16() for _ in range(2))
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    arrived, limit = torch.zeros(4, dtype=torch.int32), 2 * OUTPUT[torch.bfloat16]
    product = torch.nn.functional.silu(normed @ first.double().T) * (normed @ second.double().T)
    made = kernels.project_rows(
        x, first, second=second, eps=0.5, activation="silu", arrived=arrived, tile=tile
    )
    assert_close(made, product, limit=limit)
    exact = y.double() + x.double() @ first.double().T
    assert_close(
        kernels.project_rows(x, first, residual=y, arrived=arrived, tile=tile), exact, limit=limit
    )
    assert not arrived.any()


@needs_interpreter
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(21, 96, 32), (8, 5120, 128)], ids=str)
def test_four_bits_are_scaled_shifted_and_multiplied(outputs: int, inputs: int, group: int) -> None:
    """In one turn with groups left over, and in two of which the last is hardly filled."""
    from transnormer.ops.decode import triton_nibbles as kernels
    from transnormer.ops.decode.triton_projection import project

    generator = torch.Generator().manual_seed(7)

    def made() -> tuple[kernels.Nibbles, Tensor]:
        ints = torch.randint(0, 16, (outputs, inputs), generator=generator)
        scales, zeros = (
            (0.01 * torch.randn(outputs, inputs // group, generator=generator)).bfloat16()
            for _ in range(2)
        )
        packed = kernels.pack(ints, scales, zeros)
        assert packed is not None
        scales, zeros = (x.double().repeat_interleave(group, 1) for x in (scales, zeros))
        return packed, (ints - 8) * scales + zeros

    (weight, exact), (second, exact2) = made(), made()
    # Inputs far from 1, which come near neither end of float32.
    x, u, y = (1e4 * torch.randn(1, n, generator=generator) for n in (inputs, inputs, outputs))
    normed = x.double() / (x.double().square().mean() + 0.25).sqrt()
    wanted = y.double() + x.double() * (u / 1e4).double().sigmoid() @ exact.T
    gated = project(x, weight, gate=u / 1e4, gate_activation="sigmoid", residual=y)
    assert gated is y
    assert_close(gated, wanted, limit=4 * OUTPUT[torch.float32])
    product = torch.nn.functional.silu(normed @ exact.T) * (normed @ exact2.T)
    both = project(x, weight, second=second, eps=0.25, activation="silu")
    assert_close(both, product, limit=4 * OUTPUT[torch.float32])


@needs_interpreter
@pytest.mark.parametrize("size", [1e-11, 1e18])
def test_four_bits_take_inputs_far_from_one(size: float) -> None:
    """Sums over a long context are normed after the product only."""
    from transnormer.ops.decode import triton_nibbles, triton_projection

    generator = torch.Generator().manual_seed(9)
    ints = torch.randint(0, 16, (8, 64), generator=generator)
    scales = torch.full((8, 2), 0.01).bfloat16()
    weight = triton_nibbles.pack(ints, scales, scales)
    assert weight is not None
    x = size * torch.randn(1, 64, generator=generator)
    made = triton_projection.project(x, weight)
    exact = x.double() @ ((ints - 8) * scales[0, 0].double() + scales[0, 0].double()).T
    assert_close(made / size, exact / size, limit=4 * OUTPUT[torch.float32])


@needs_interpreter
@pytest.mark.parametrize("tokens", [1, 2])
def test_positions_outside_the_pool_are_not_touched(tokens: int) -> None:
    from transnormer.ops.decode import triton_pointwise as kernels

    # What lies behind the pool belongs to others.
    memory = torch.tensor([7, 5, 3, 1, 1])
    slots = torch.tensor([2, -1, 4, 0], dtype=torch.int32)
    ids, table = torch.zeros(4, tokens, dtype=torch.int32), torch.randn(3, 16)
    _, where = kernels.begin(ids, slots, table, memory[:3], 1.0, overlap=False)
    assert memory.tolist() == [7 + tokens, 5, 3 + tokens, 1, 1]
    assert where.view(4, tokens)[:, 0].tolist() == [3, 0, 0, 7]


@needs_interpreter
def test_what_modules_give_may_lie_anyhow() -> None:
    """Products of padded weights are cut off, so their rows are further apart."""
    from transnormer.ops.decode import triton_pointwise as kernels

    g, u, x = torch.randn(3, 24)[:, :20], torch.randn(3, 22)[:, :20], torch.randn(3, 20)
    product, total = g.relu() * u, x + u
    normed = total / (total.square().mean(-1, keepdim=True) + 0.5).sqrt()
    assert_close(kernels.product(g, u, "relu", overlap=False), product.double())
    assert_close(kernels.add_norm(x, u, 0.5, overlap=False), normed.double())
    assert_close(x, total.double())


@needs_interpreter
def test_groups_that_kernels_do_not_read_are_not_packed() -> None:
    from transnormer.ops.decode import triton_nibbles as kernels

    ints = torch.zeros(4, 96, dtype=torch.int32)
    for groups, dtype in ((2, torch.bfloat16), (6, torch.bfloat16), (3, torch.float32)):
        scales = torch.ones(4, groups, dtype=dtype)
        assert kernels.pack(ints, scales, scales) is None


@needs_interpreter
@pytest.mark.parametrize(("dim", "capacity", "turned"), [(16, 4, False), (12, 6, True)], ids=str)
def test_rings_give_what_states_give(dim: int, capacity: int, turned: bool) -> None:
    """Over several folds, rows that are skipped, and rings whose memory holds NaN."""
    from transnormer.ops.decode import triton_pointwise as kernels
    from transnormer.ops.decode import triton_ring_mix as rings

    heads, key_dim = 2, dim * (1 + turned)
    theta, g = torch.rand(heads, dim) if turned else None, torch.tensor([-0.01, -3.0])
    ring = RingState.empty(5, heads, key_dim, dim, capacity=capacity)
    ring.keys.fill_(math.nan)
    ring.values.fill_(math.nan)
    ring.state.normal_()
    assert rings.fits(ring)
    pool = ring.state.clone()
    for t in range(2 * capacity + 1):
        qkvu, where = torch.randn(3, 4 * heads * dim), torch.full((3,), t, dtype=torch.int64)
        slots = torch.tensor([[4, -1, 0], [2, 3, -1], [0, 4, 2]][t % 3], dtype=torch.int32)
        common = (slots, heads, "silu", "none")
        made = rings.ring_mix(qkvu, where, theta, g, ring, *common, overlap=False)
        exact = kernels.mix(qkvu, where, theta, g, pool, *common, overlap=False)
        assert_close(made, exact)
        u = qkvu[:, 3 * heads * dim :]
        gated = kernels.norm_gate(made, u, 0.5, "silu", overlap=False, ring=ring, slots=slots)
        assert torch.equal(gated, kernels.norm_gate(made, u, 0.5, "silu", overlap=False))
    assert_close(ring.fold(g), pool)
    assert ring.length.max() <= capacity


@needs_interpreter
def test_a_ring_rolled_back_too_far_shows_and_touches_nothing() -> None:
    from transnormer.ops.decode import triton_ring_mix as rings

    ring = RingState.empty(3, 2, 16, 16)
    ring.length[:] = torch.tensor([0, -1, 0])
    before = RingState(*(x.clone() for x in ring))
    qkvu, where = torch.randn(3, 4 * 32), torch.zeros(3, dtype=torch.int64)
    slots = torch.tensor([1, 3, -1], dtype=torch.int32)
    common = (None, torch.tensor([-0.5, -2.0]), ring, slots, 2, "silu", "none")
    o = rings.ring_mix(qkvu, where, *common, overlap=False)
    assert torch.isnan(o[:2]).all()
    assert torch.equal(o[2], torch.zeros(32))
    assert all(torch.equal(x, y) for x, y in zip(ring, before, strict=True))


@needs_interpreter
@pytest.mark.parametrize("ringed", [False, True], ids=["state", "ring"])
def test_channels_that_no_head_has_add_nothing(ringed: bool) -> None:
    """Kernels work in powers of two of channels, and a sigmoid of 0 is not 0."""
    from transnormer.ops.decode import triton_pointwise as kernels
    from transnormer.ops.decode import triton_ring_mix as rings

    heads, dim = 2, 12
    ring = RingState.empty(1, heads, dim, dim, capacity=4)
    qkvu, where = torch.randn(1, 4 * heads * dim), torch.zeros(1, dtype=torch.int64)
    q, k, v, _ = qkvu.double().view(4, heads, dim)
    exact = (q.sigmoid() * k.sigmoid()).sum(-1, keepdim=True) * v
    common = (torch.zeros(1, dtype=torch.int32), heads, "sigmoid", "none")
    if ringed:
        o = rings.ring_mix(qkvu, where, None, None, ring, *common, overlap=False)
    else:
        o = kernels.mix(qkvu, where, None, None, ring.state, *common, overlap=False)
    assert_close(o[0], exact.flatten())


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
