"""The kernels for gated decay against the recurrence, in Triton's interpreter at toy sizes."""

import pytest
import torch
from attention_cases import MIXED_DECAYS, Inputs, make_inputs
from kernel_cases import (
    FORM,
    assert_same,
    check_all,
    force_segment_count,
    laid_out,
    needs_interpreter,
    results,
)
from tolerances import KERNEL_GATE_GRADIENT, assert_close

from transnormer.ops import linear_attention
from transnormer.ops.dispatch import choose
from transnormer.ops.linear_attention import IMPLEMENTATIONS, Request

pytestmark = needs_interpreter

OP = "gated_decay_attention"
GATES = pytest.mark.parametrize("gate", ["key", "token"])
NEGATIVE_INFINITY = float("-inf")


def one_row(seq: int, gate: str = "key", **kwargs: object) -> Inputs:
    """A batch of one with an initial state and decays of every size mixed."""
    return make_inputs(seq, **({"decay": gate, "batch": 1, "heads": 1, "state_rows": 1} | kwargs))


@pytest.mark.parametrize(("seq", "gate"), [(1, "key"), (32, "key"), (70, "key"), (33, "token")])
def test_every_length(seq: int, gate: str) -> None:
    check_all(one_row(seq, gate))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 16), (12, 8), (96, 36), (96, 80)], ids=str)
def test_every_size_of_a_head(key_dim: int, value_dim: int) -> None:
    check_all(one_row(18, key_dim=key_dim, value_dim=value_dim))


@pytest.mark.parametrize(
    ("gate", "reverse"), [("key", True), ("token", False)], ids=["key-reverse", "token-forward"]
)
def test_query_heads_share_keys_values_and_gates(gate: str, reverse: bool) -> None:
    check_all(one_row(35, gate, heads=2, kv_heads=1), reverse=reverse, scale=-0.37)


def test_rows_of_a_batch() -> None:
    check_all(make_inputs(5, decay="key", batch=2, heads=2, state_rows=2))


def test_float16() -> None:
    check_all(one_row(66, dtype=torch.float16))


def test_float16_states_may_exceed_the_range_of_float16() -> None:
    q, k, v, log_decay, state = one_row(66, dtype=torch.float16)
    inputs = Inputs(q, k * 20, v * 20, log_decay.clamp(min=-0.01), state * 1e5)
    check_all(inputs, scale=1e-4)


def test_bfloat16() -> None:
    check_all(one_row(35, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [(torch.float32, x) for x in (0.0, -1e-6, -30.0, NEGATIVE_INFINITY)]
    + [(torch.float16, x) for x in (-9.0, -30.0)],
    ids=str,
)
def test_the_same_decay_at_every_token(decay: float, dtype: torch.dtype) -> None:
    # Alone in its call: beside other decays the error of a faint gradient would not show.
    inputs = one_row(34, dtype=dtype)
    inputs = inputs._replace(log_decay=torch.full_like(inputs.log_decay, decay))
    exact = results(inputs.double(), "reference")
    for name, x, y in zip(("o", "final_state", *Inputs._fields), results(inputs), exact):
        assert_close(x, y, limit=KERNEL_GATE_GRADIENT[dtype], name=name)


@GATES
def test_strong_and_weak_decays_in_turn(gate: str) -> None:
    inputs = one_row(40, gate)
    decays = torch.tensor(MIXED_DECAYS)[torch.arange(40) // 3 % len(MIXED_DECAYS)]
    shape = (1, 40, 1, 1) if gate == "key" else (1, 40, 1)
    check_all(
        inputs._replace(log_decay=decays.view(shape).expand_as(inputs.log_decay).contiguous())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [-0.1, -0.5, -1.1, -5.0])
def test_blocks_of_every_size(decay: float, dtype: torch.dtype) -> None:
    # A chunk is one product, or is cut into blocks of 16, of 4 or of one token, as decay asks for.
    inputs = one_row(70, dtype=dtype)
    log_decay = decay * (0.9 + 0.2 * torch.rand_like(inputs.log_decay))
    check_all(inputs._replace(log_decay=log_decay))


@pytest.mark.parametrize("seq", [2, 3])
def test_strong_decay_over_few_tokens(seq: int) -> None:
    # So few that a chunk is one product; what the last token leaves is 1e13 times the gradient.
    inputs = one_row(seq, dtype=torch.bfloat16)
    check_all(inputs._replace(log_decay=torch.full_like(inputs.log_decay, -28.0)))


@pytest.mark.parametrize("strong", [-30.0, NEGATIVE_INFINITY], ids=str)
@pytest.mark.parametrize("weak", [-0.01, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_half_of_a_chunk_may_decay_to_nothing(
    dtype: torch.dtype, weak: float, strong: float
) -> None:
    # What the strong half leaves must not show the rounding errors of the weak half.
    inputs = one_row(64, dtype=dtype)
    half = torch.arange(64)[:, None] // 16 % 2 == torch.arange(16) % 2
    log_decay = torch.where(half, strong, weak).view(1, 64, 1, 16)
    check_all(inputs._replace(log_decay=log_decay))


@pytest.mark.parametrize(
    ("gate", "seq", "reverse", "kv_heads", "states"),
    [
        ("key", 70, False, 1, 1),
        ("key", 97, True, 1, None),
        # The last segment has no token.
        ("key", 33, True, 2, 1),
    ],
    ids=["key", "key-reverse", "empty-reverse"],
)
def test_segments_change_nothing(
    gate: str,
    seq: int,
    reverse: bool,
    kv_heads: int,
    states: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_segment_count(monkeypatch, 3)
    inputs = one_row(seq, gate, heads=2, kv_heads=kv_heads, state_rows=states)
    if states is None:
        inputs = one_row(seq, gate, state_rows=None)
    check_all(inputs, reverse=reverse)


# Lengths 0, 1, 40, 70 and 0: of three walks the second has a bound within and the third none of its
# first tokens, so that what leaks over the bound shows.
BOUNDS = [0, 0, 1, 41, 111, 111]


@pytest.mark.parametrize(
    ("gate", "segments", "reverse", "states"),
    [("key", 1, False, True), ("key", 3, True, True), ("token", 3, False, False)],
    ids=["key-one", "key-three-reverse", "token-three-no_states"],
)
def test_packed(
    gate: str, segments: int, reverse: bool, states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segment_count(monkeypatch, segments)
    heads, rows = (2 if segments == 1 else 1), (5 if states else None)
    inputs = make_inputs(111, decay=gate, batch=1, heads=heads, kv_heads=1, state_rows=rows)
    if segments > 1:
        # Weak enough to carry something from walk to walk.
        inputs = inputs._replace(log_decay=inputs.log_decay.clamp(min=-0.01))
    check_all(inputs, cu_seqlens=torch.tensor(BOUNDS), reverse=reverse)


def test_empty_sequences_pass_their_state_and_its_gradient_through() -> None:
    q, k, v, log_decay, state = make_inputs(10, decay="key", batch=1, state_rows=3)
    state.requires_grad_()
    bounds = torch.tensor([0, 0, 10, 10])
    _, final_state = linear_attention(
        q, k, v, log_decay, initial_state=state, cu_seqlens=bounds, implementation=FORM
    )
    assert torch.equal(final_state[[0, 2]], state[[0, 2]])
    final_state.sum().backward()
    assert torch.equal(state.grad[[0, 2]], torch.ones_like(state[[0, 2]]))


@pytest.mark.parametrize(
    ("layout", "gate"),
    [("surrounded", "key"), ("reversed_dims", "key"), ("every_second", "token")],
)
def test_strides_change_nothing(layout: str, gate: str) -> None:
    inputs = make_inputs(5, decay=gate, heads=2)
    moved = [laid_out(x, layout) for x in inputs[:3]]
    decay = inputs.log_decay
    decay = laid_out(decay, layout) if gate == "key" else laid_out(decay[..., None], layout)[..., 0]
    assert_same(results(Inputs(*moved, decay, None)), results(inputs))


def test_one_gate_for_all_keys_may_be_expanded() -> None:
    inputs = one_row(17, "token")
    wide = inputs.log_decay[..., None].expand_as(inputs.k)
    exact = results(inputs.double()._replace(log_decay=wide.double()), "chunked")
    actual = results(inputs._replace(log_decay=wide))
    for x, y in zip(actual, exact):
        assert_close(x, y, limit=KERNEL_GATE_GRADIENT[torch.float32])


@pytest.mark.parametrize(("gate", "position"), [("key", 15), ("key", 32)])
def test_outputs_depend_on_no_later_token(gate: str, position: int) -> None:
    inputs = one_row(34, gate)
    before = results(inputs)
    changed = [x.clone() for x in inputs[:4]]
    for x, change in zip(changed, (1.0, 1.0, 1.0, -1.0)):
        x[:, position] += change
    after = results(Inputs(*changed, inputs.initial_state))
    assert torch.equal(before[0][:, :position], after[0][:, :position])
    assert not torch.equal(before[0][:, position], after[0][:, position])
    # Gradients of keys and values come from no earlier query.
    for i in (3, 4):
        assert torch.equal(before[i][:, position + 1 :], after[i][:, position + 1 :])


def test_nothing_of_one_sequence_reaches_another() -> None:
    inputs = make_inputs(60, decay="key", batch=1, heads=1, state_rows=3)
    bounds = torch.tensor([0, 20, 40, 60])
    before = results(inputs, cu_seqlens=bounds)
    spoiled = [x.clone() for x in inputs[:4]]
    for x in spoiled[:3]:
        x[:, 20:40] = float("nan")
    after = results(Inputs(*spoiled, inputs.initial_state), cu_seqlens=bounds)
    for i in (0, 2, 3, 4, 5):
        assert torch.equal(before[i][:, :20], after[i][:, :20])
        assert torch.equal(before[i][:, 40:], after[i][:, 40:])
    for i in (1, 6):
        assert torch.equal(before[i][[0, 2]], after[i][[0, 2]])
    assert bool(after[1][1].isnan().any())


def test_runs_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    force_segment_count(monkeypatch, 2)
    inputs = one_row(34, heads=2, kv_heads=1)
    assert_same(results(inputs), results(inputs))


def test_any_one_gradient_alone() -> None:
    inputs = one_row(5)
    exact = dict(zip(Inputs._fields, results(inputs)[2:]))
    for name in Inputs._fields:
        leaves = [x.detach().requires_grad_(n == name) for n, x in zip(Inputs._fields, inputs)]
        o, state = linear_attention(*leaves[:4], initial_state=leaves[4], implementation=FORM)
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(x.shape, generator=generator).half().float() for x in (o, state)]
        torch.autograd.backward((o, state), draws)
        assert [x.grad is not None for x in leaves] == [n == name for n in Inputs._fields]
        assert_close(leaves[Inputs._fields.index(name)].grad, exact[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_log_decay_may_have_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    inputs = one_row(5)
    log_decay = inputs.log_decay.to(dtype)
    exact = results(inputs._replace(log_decay=log_decay.float()))
    actual = results(inputs._replace(log_decay=log_decay))
    assert actual[5].dtype == dtype
    assert_same([*actual[:5], actual[6]], [*exact[:5], exact[6]])
    assert torch.equal(actual[5], exact[5].to(dtype))


def test_the_library_ops_pass_opcheck() -> None:
    bounds, inputs = None, one_row(3)
    q, k, v, log_decay, state = inputs.leaves()
    op = getattr(torch.ops.transnormer, OP).default
    torch.library.opcheck(op, (q, k, v, log_decay, state, bounds, 1.0, False))
    q, k, v, log_decay, state = inputs
    op = getattr(torch.ops.transnormer, f"{OP}_backward").default
    arguments = (torch.randn_like(v), None, q, k, v, log_decay, state, bounds, 1.0, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*arguments, True, True), test_utils=checks)


@pytest.mark.parametrize("decay_dims", [0, 1, 3, 4])
def test_auto_takes_the_kernels_for_every_decay(decay_dims: int) -> None:
    # Tensors without values may be a GPU's.
    for name in (FORM, "auto"):
        request = Request(torch.device("meta"), torch.bfloat16, 64, 64, decay_dims, name == FORM)
        assert choose("linear_attention", IMPLEMENTATIONS, request, name).name == "triton"
