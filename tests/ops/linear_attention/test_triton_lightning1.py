"""The kernels of quadratic tiles against the recurrence, in Triton's interpreter at toy sizes."""

import sys

import pytest
import torch
from attention_cases import Inputs, check_forward, check_gradients, make_inputs
from kernel_cases import (
    BOUNDS,
    LAYOUTS,
    assert_same,
    fused,
    laid_out,
    needs_interpreter,
    results,
)
from tolerances import FORMS_FLOAT32, GRADIENT, KERNEL_STATE, OUTPUT, assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from transnormer.ops import linear_attention
from transnormer.ops.dispatch import Implementation
from transnormer.ops.linear_attention.lightning1_ops import lightning1_attention, runs_kernels

pytestmark = needs_interpreter

# "lightning1" is the PyTorch form on a CPU: the kernels get a name of their own here.
FORM = "kernels of lightning1"
DIMS = ((20, 16), (96, 32), (16, 256), (256, 24))


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["transnormer.ops.linear_attention"]
    row = Implementation(FORM, lambda _: None, lightning1_attention, False)
    monkeypatch.setattr(module, "IMPLEMENTATIONS", (*module.IMPLEMENTATIONS, row))


def one_row(seq: int, **kwargs: object) -> Inputs:
    """A batch of one with an initial state."""
    return make_inputs(seq, **({"batch": 1, "heads": 1, "state_rows": 1} | kwargs))


def with_decay(inputs: Inputs, *values: float) -> Inputs:
    """The inputs with another constant decay."""
    return inputs._replace(log_decay=torch.tensor(values))


@pytest.mark.parametrize("seq", [1, 33, 64, 129])
def test_every_length(seq: int) -> None:
    inputs = one_row(seq, heads=2)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("decay", [0.0, -1e-6, -0.3, -60.0, float("-inf")])
def test_every_decay_alone(decay: float) -> None:
    # Beside heads that remember, the errors of one that forgets would not show.
    inputs = with_decay(one_row(150), decay)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS, ids=str)
def test_every_size_of_a_head(key_dim: int, value_dim: int) -> None:
    inputs = with_decay(one_row(70, key_dim=key_dim, value_dim=value_dim), -0.02)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


def test_no_decay_and_no_states() -> None:
    inputs = make_inputs(100, decay="none")
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("seq", [1, 100])
def test_reverse(seq: int) -> None:
    inputs = one_row(seq, heads=3)
    check_forward(inputs, FORM, reverse=True)
    check_gradients(inputs, FORM, reverse=True)


def test_query_heads_share_keys_and_values() -> None:
    inputs = one_row(70, heads=4, kv_heads=2)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("scale", [0.37, -2.0, 0.0])
def test_scale_multiplies_outputs_and_not_states(scale: float) -> None:
    inputs = with_decay(one_row(70), -0.02)
    check_forward(inputs, FORM, scale=scale)
    check_gradients(inputs, FORM, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = one_row(150, heads=2, dtype=dtype)
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[dtype])
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("decay", [-9.0, -20.0])
def test_float16_scores_that_fade_within_a_tile(decay: float) -> None:
    inputs = with_decay(one_row(150, dtype=torch.float16), decay)
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[torch.float16])
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("decay", [-87.0, -103.0])
def test_scores_below_the_range_of_float32_vanish(decay: float) -> None:
    inputs = with_decay(one_row(150, dtype=torch.float16), decay)
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[torch.float16])
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    o, _ = linear_attention(q, k, v, inputs.log_decay, implementation=FORM)
    o.backward(torch.ones_like(o))
    # All that is left is that a token sees itself.
    exact = (v.sum(-1, keepdim=True) * k).detach()
    assert_close(q.grad, exact.double(), limit=GRADIENT[torch.float16], name="gradient of q")


def test_float16_states_may_exceed_the_range_of_float16() -> None:
    q, k, v, _, state = one_row(150, decay="none", dtype=torch.float16)
    check_forward(
        Inputs(q * 1e-3, k * 20, v * 20, None, state * 1e6),
        FORM,
        state_limit=KERNEL_STATE[torch.float16],
    )


def test_float16_scores_may_exceed_the_range_of_float16() -> None:
    q, k, v, _, state = one_row(150, decay="none", dtype=torch.float16)
    check_forward(
        Inputs(q * 20, k * 8000, v * 1e-2, None, state),
        FORM,
        state_limit=KERNEL_STATE[torch.float16],
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(reverse: bool) -> None:
    inputs = with_decay(make_inputs(169, batch=1, heads=1, state_rows=9), -0.02)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    check_forward(inputs, FORM, cu_seqlens=bounds, reverse=reverse)
    check_gradients(inputs, FORM, cu_seqlens=bounds, reverse=reverse)


def test_packed_without_states_or_decay() -> None:
    inputs = make_inputs(300, decay="none", batch=1, heads=1)
    bounds = torch.tensor([0, 200, 200, 201, 300])
    check_forward(inputs, FORM, cu_seqlens=bounds)
    check_gradients(inputs, FORM, cu_seqlens=bounds)


def test_empty_sequences_pass_their_state_and_its_gradient_through() -> None:
    q, k, v, log_decay, state = make_inputs(10, batch=1, state_rows=3)
    state.requires_grad_()
    bounds = torch.tensor([0, 0, 10, 10])
    _, final_state = linear_attention(
        q, k, v, log_decay, initial_state=state, cu_seqlens=bounds, implementation=FORM
    )
    assert torch.equal(final_state[[0, 2]], state[[0, 2]])
    final_state.sum().backward()
    assert torch.equal(state.grad[[0, 2]], torch.ones_like(state[[0, 2]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str) -> None:
    inputs = make_inputs(70, decay="none", batch=1, kv_heads=1)
    moved = inputs._replace(**{name: laid_out(getattr(inputs, name), layout) for name in "qkv"})
    assert_same(results(moved, FORM), results(inputs, FORM))


def test_slices_of_one_projection() -> None:
    inputs = one_row(70, heads=2, kv_heads=1)
    sliced = Inputs(*fused(*inputs[:3]), *inputs[3:])
    assert_same(results(sliced, FORM, reverse=True), results(inputs, FORM, reverse=True))


def test_bounds_decays_and_states_with_strides() -> None:
    inputs = make_inputs(20, batch=1, state_rows=3)
    bounds = torch.tensor([0, 3, 3, 20])
    exact = results(inputs, FORM, cu_seqlens=bounds)
    state = inputs.initial_state.transpose(2, 3).contiguous().transpose(2, 3)
    moved = inputs._replace(
        log_decay=torch.stack([inputs.log_decay, inputs.log_decay * 3], 1)[:, 0],
        initial_state=state,
    )
    strided = torch.stack([bounds, bounds.flip(0)], 1)[:, 0]
    assert_same(results(moved, FORM, cu_seqlens=strided), exact)


@pytest.mark.parametrize("split", [1, 64])
def test_a_call_split_in_two_gives_the_same(split: int) -> None:
    q, k, v, log_decay, state = with_decay(one_row(150), -0.02)
    whole, whole_state = linear_attention(
        q, k, v, log_decay, initial_state=state, implementation=FORM
    )
    outputs = []
    for part in (slice(0, split), slice(split, 150)):
        o, state = linear_attention(
            q[:, part], k[:, part], v[:, part], log_decay, initial_state=state, implementation=FORM
        )
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole, limit=FORMS_FLOAT32)
    assert_close(state, whole_state, limit=FORMS_FLOAT32)


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    inputs = make_inputs(33, heads=4, kv_heads=2, state_rows=2, dtype=torch.float16)
    exact = results(inputs, FORM)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Inputs(*(mode.from_tensor(x) for x in inputs))
        leaves = [x.requires_grad_() for x in fake]
        outputs = lightning1_attention(
            *leaves[:4], scale=1.0, initial_state=leaves[4], cu_seqlens=None, reverse=False
        )
        grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    for actual, x in zip((*outputs, *grads), exact, strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (x.shape, x.dtype, x.stride())


def test_the_name_means_plain_pytorch_on_a_cpu_and_for_what_kernels_lack() -> None:
    assert not runs_kernels(torch.device("cpu"), torch.float32, 64, 64)
    for dtype, dims in ((torch.float64, (64, 64)), (torch.bfloat16, (257, 64))):
        assert not runs_kernels(torch.device("cuda"), dtype, *dims)
    inputs = one_row(20)
    o, _ = linear_attention(*inputs[:4], implementation="lightning1")
    exact, _ = linear_attention(*inputs[:4], implementation="reference")
    assert_close(o, exact, limit=OUTPUT[torch.float32])
