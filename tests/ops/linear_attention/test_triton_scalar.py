"""The sweeps with scalar gates against the recurrence, in Triton's interpreter at toy sizes.

16-bit inputs; float32 ones take the kernels of ``test_triton_gated``.
"""

import pytest
import torch
from attention_cases import MIXED_DECAYS, Inputs, make_inputs
from kernel_cases import (
    FORM,
    assert_same,
    check_all,
    force_segments,
    laid_out,
    needs_interpreter,
    results,
)
from tolerances import KERNEL_GATE_GRADIENT, KERNEL_STATE, assert_close

from transnormer.ops import linear_attention

pytestmark = needs_interpreter

FP16, BF16 = torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
NEGATIVE_INFINITY = float("-inf")
# Lengths 0, 1, 40, 100 and 0.
BOUNDS = [0, 0, 1, 41, 141, 141]


def one_row(seq: int, dtype: torch.dtype = FP16, **kwargs: object) -> Inputs:
    """A batch of one with an initial state and decays of every size mixed."""
    defaults = {"decay": "token", "batch": 1, "heads": 1, "state_rows": 1, "dtype": dtype}
    return make_inputs(seq, **(defaults | kwargs))


def with_gates(inputs: Inputs, log_decay: torch.Tensor) -> Inputs:
    """The inputs with other gates, of any shape that expands to theirs."""
    return inputs._replace(log_decay=log_decay.expand_as(inputs.log_decay).contiguous())


def weak(inputs: Inputs) -> Inputs:
    """The inputs with gates that carry something over hundreds of tokens, more in the first head."""
    heads = 1 + 3 * torch.arange(inputs.k.shape[2])
    return with_gates(inputs, inputs.log_decay.clamp(min=-1.0) * 0.003 * heads)


@pytest.mark.parametrize(
    ("seq", "dtype"), [(1, FP16), (15, BF16), (64, FP16), (65, BF16), (130, FP16)], ids=str
)
def test_every_length(seq: int, dtype: torch.dtype) -> None:
    check_all(one_row(seq, dtype, heads=2))


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [(12, 8, FP16), (32, 96, BF16), (96, 80, FP16), (128, 128, BF16), (160, 24, BF16)],
    ids=str,
)
def test_every_size_of_a_head(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check_all(one_row(66, dtype, key_dim=key_dim, value_dim=value_dim))


def test_query_heads_share_keys_values_and_gates() -> None:
    inputs = make_inputs(70, decay="token", heads=4, kv_heads=2, state_rows=2, dtype=FP16)
    check_all(inputs, reverse=True, scale=-0.37)


def test_without_an_initial_state() -> None:
    check_all(make_inputs(70, decay="token", dtype=BF16))


@DTYPES
@pytest.mark.parametrize("decay", [0.0, -1e-6, -1.0, -9.0, -30.0, NEGATIVE_INFINITY])
def test_the_same_decay_at_every_token(decay: float, dtype: torch.dtype) -> None:
    # Alone in its call: beside other decays the error of a faint gradient would not show.
    inputs = with_gates(one_row(66, dtype), torch.tensor(decay))
    exact = results(inputs.double(), "reference")
    for name, x, y in zip(("o", "final_state", *Inputs._fields), results(inputs), exact):
        assert_close(x, y, limit=KERNEL_GATE_GRADIENT[dtype], name=name)


@DTYPES
def test_strong_and_weak_decays_in_turn(dtype: torch.dtype) -> None:
    decays = torch.tensor(MIXED_DECAYS)[torch.arange(100) // 3 % len(MIXED_DECAYS)]
    check_all(with_gates(one_row(100, dtype), decays.view(1, 100, 1)))


def test_float16_states_may_exceed_the_range_of_float16() -> None:
    q, k, v, log_decay, state = one_row(66)
    inputs = Inputs(q, k * 20, v * 20, log_decay.clamp(min=-0.01), state * 1e5)
    check_all(inputs, scale=1e-4)


@pytest.mark.parametrize(
    ("reverse", "dtype", "kv_heads"), [(False, BF16, 2), (True, FP16, 1)], ids=str
)
def test_segments_change_nothing(
    reverse: bool, dtype: torch.dtype, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three segments, the last of which is short and has pieces without a token.
    force_segments(monkeypatch, 256)
    check_all(weak(one_row(530, dtype, heads=2, kv_heads=kv_heads)), reverse=reverse)


@pytest.mark.parametrize(
    ("reverse", "dtype", "states"), [(False, FP16, True), (True, BF16, False)], ids=str
)
def test_packed(
    reverse: bool, dtype: torch.dtype, states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segments(monkeypatch, 64)
    inputs = weak(one_row(141, dtype, heads=2, kv_heads=1, state_rows=5 if states else None))
    check_all(inputs, cu_seqlens=torch.tensor(BOUNDS), reverse=reverse)


@pytest.mark.parametrize("layout", ["surrounded", "every_second"])
def test_strides_change_nothing(layout: str) -> None:
    inputs = make_inputs(5, decay="token", dtype=FP16)
    moved = [laid_out(x, layout) for x in inputs[:3]]
    gates = laid_out(inputs.log_decay[..., None], layout)[..., 0]
    assert_same(results(Inputs(*moved, gates, None)), results(inputs))


def test_outputs_depend_on_no_later_token() -> None:
    # Not in float16, whose scale is taken from a whole chunk.
    inputs = one_row(70, BF16)
    before = results(inputs)
    changed = [x.clone() for x in inputs[:4]]
    for x, change in zip(changed, (1.0, 1.0, 1.0, -1.0)):
        x[:, 40] += change
    after = results(Inputs(*changed, inputs.initial_state))
    assert torch.equal(before[0][:, :40], after[0][:, :40])
    assert not torch.equal(before[0][:, 40], after[0][:, 40])
    # Gradients of keys and values come from no earlier query; sums of gates round differently.
    for i in (3, 4):
        assert_close(after[i][:, 41:], before[i][:, 41:], limit=KERNEL_STATE[BF16])


def test_any_one_gradient_alone() -> None:
    inputs = one_row(66, BF16)
    exact = dict(zip(Inputs._fields, results(inputs)[2:]))
    for name in Inputs._fields:
        leaves = [x.detach().requires_grad_(n == name) for n, x in zip(Inputs._fields, inputs)]
        outputs = linear_attention(*leaves[:4], initial_state=leaves[4], implementation=FORM)
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(x.shape, generator=generator).half().to(x.dtype) for x in outputs]
        torch.autograd.backward(outputs, draws)
        assert torch.equal(leaves[Inputs._fields.index(name)].grad, exact[name])


@pytest.mark.parametrize("reverse", [False, True])
def test_differences_of_sums_of_gates_are_exact(reverse: bool) -> None:
    from transnormer.ops.linear_attention import triton_launch

    inputs = one_row(300, heads=2)
    decays = torch.tensor([-1e-7, -1e-3, -0.3, -5.0, -100.0, -1e30])
    gates = decays[torch.randint(len(decays), (1, 300, 2))] * (0.5 + torch.rand(1, 300, 2))
    q, k, v = inputs[:3]
    call = triton_launch.Call(q, k, v, gates, None, 1.0, reverse)
    # The last chunk, which is short.
    start = 300 // call.form.chunk * call.form.chunk
    stop = 300
    sums = call.log_decay[0, :, start:stop]
    exact = (gates[0, start:stop].double() / torch.tensor(2.0).double().log()).clamp(min=-160).mT
    exact = exact.flip(1).cumsum(1).flip(1) if reverse else exact.cumsum(1)
    differences = (sums[:, :, None] - sums[:, None]).double().sum(-1)
    errors = (differences - (exact[:, :, None] - exact[:, None])).abs()
    # The largest error is that of rounding a gate near -160 itself.
    assert errors.max() < 64 * 160 * 2**-24
    near = (exact[:, :, None] - exact[:, None]).abs() < 1
    assert errors[near].max() < 2**-22


def test_the_library_ops_pass_opcheck() -> None:
    bounds = torch.tensor([0, 2, 2, 3])
    inputs = one_row(3, BF16, state_rows=3)
    op = torch.ops.transnormer.scalar_gate_attention.default
    torch.library.opcheck(op, (*inputs.leaves(), bounds, 1.0, False))
    op = torch.ops.transnormer.scalar_gate_attention_backward.default
    arguments = (torch.randn_like(inputs.v), None, *inputs, bounds, 1.0, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*arguments, True, True), test_utils=checks)
