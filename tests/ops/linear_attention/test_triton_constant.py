"""The kernels of constant decay against the recurrence, in Triton's interpreter at toy sizes."""

import math

import pytest
import torch
from attention_cases import Inputs, check_forward, check_gradients, make_inputs
from kernel_cases import (
    BOUNDS,
    FORM,
    ONE_SEGMENT,
    force_segment_count,
    force_segments,
    gradients_of,
    needs_interpreter,
    results,
)
from tolerances import FORMS_FLOAT32, KERNEL_GRADIENT, KERNEL_STATE, assert_close

from transnormer.ops import linear_attention
from transnormer.ops.decay import tnl_log_decay

pytestmark = needs_interpreter

LENGTHS = (1, 15, 16, 63, 64, 65, 100, 129, 257)
DIMS = ((20, 16), (32, 96), (96, 32), (16, 256), (256, 24), (12, 8))
# exp of these is subnormal in float32, or just above, or 0.
FAINT_DECAYS = (-80.0, -88.0, -95.0, -103.0)


def one_row(seq: int, **kwargs: object) -> Inputs:
    """A batch of one with an initial state."""
    return make_inputs(seq, **({"batch": 1, "heads": 1, "state_rows": 1} | kwargs))


def with_decay(inputs: Inputs, values: torch.Tensor) -> Inputs:
    """The inputs with another constant decay."""
    return inputs._replace(log_decay=values)


@pytest.mark.parametrize("seq", LENGTHS)
def test_every_length(seq: int) -> None:
    inputs = one_row(seq, heads=2)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS, ids=str)
def test_every_size_of_a_head(key_dim: int, value_dim: int) -> None:
    inputs = one_row(70, key_dim=key_dim, value_dim=value_dim)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("seq", [65])
def test_no_decay(seq: int) -> None:
    inputs = one_row(seq, decay="none", batch=2, state_rows=2)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("layer", [0, 23], ids=["first_layer", "last_layer"])
def test_the_decays_of_released_models(layer: int) -> None:
    inputs = with_decay(one_row(100, heads=2), tnl_log_decay(2, layer, 24))
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("seq", [1, 35])
def test_decays_that_leave_almost_nothing(seq: int, dtype: torch.dtype) -> None:
    inputs = one_row(seq, heads=len(FAINT_DECAYS), dtype=dtype)
    inputs = with_decay(inputs, torch.tensor(FAINT_DECAYS))
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[dtype])
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("decay", [-9.0, -12.0, -20.0])
def test_a_faint_gradient_of_the_state_keeps_its_digits_in_float16(decay: float) -> None:
    # Alone in its call: beside other heads its error would not show.
    inputs = with_decay(one_row(3, dtype=torch.float16), torch.tensor([decay]))
    exact = results(inputs.double(), "reference")
    names = ("o", "final_state", *Inputs._fields)
    for name, x, y in zip(names, results(inputs), exact):
        assert_close(x, y, limit=2 * KERNEL_GRADIENT[torch.float16], name=name)


def test_without_an_initial_state() -> None:
    inputs = make_inputs(35)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("seq", [1, 65])
def test_reverse(seq: int) -> None:
    inputs = one_row(seq, heads=3)
    check_forward(inputs, FORM, reverse=True)
    check_gradients(inputs, FORM, reverse=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2)])
def test_query_heads_share_keys_and_values(heads: int, kv_heads: int) -> None:
    inputs = one_row(70, heads=heads, kv_heads=kv_heads)
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize("scale", [0.37, -2.0, 0.0])
def test_scale_multiplies_outputs_and_not_states(scale: float) -> None:
    inputs = one_row(35)
    check_forward(inputs, FORM, scale=scale)
    check_gradients(inputs, FORM, scale=scale)


@pytest.mark.parametrize("seq", [70])
def test_float16(seq: int) -> None:
    inputs = one_row(seq, heads=5, dtype=torch.float16)
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[torch.float16])
    check_gradients(inputs, FORM)


def test_float16_states_may_exceed_the_range_of_float16() -> None:
    q, k, v, _, state = one_row(100, decay="none", dtype=torch.float16)
    check_forward(
        Inputs(q * 1e-3, k * 20, v * 20, None, state * 1e5),
        FORM,
        state_limit=KERNEL_STATE[torch.float16],
    )


def test_float16_gradients_of_states_may_exceed_the_range_of_float16() -> None:
    q, k, v, log_decay, state = one_row(100, dtype=torch.float16)
    inputs = Inputs(q, k * 1e-3, v * 1e-3, log_decay, state)
    grads = []
    for form, part in (("reference", inputs.double()), (FORM, inputs)):
        leaves = part.leaves()
        outputs = linear_attention(
            *leaves[:4], initial_state=leaves.initial_state, implementation=form
        )
        o_grad, state_grad = gradients_of(outputs)
        torch.autograd.backward(outputs, [o_grad, state_grad * 1e6])
        grads.append([leaves.k.grad, leaves.v.grad, leaves.initial_state.grad])
    for name, actual, exact in zip(("k", "v", "initial_state"), grads[1], grads[0]):
        assert_close(actual, exact, limit=KERNEL_GRADIENT[torch.float16], name=name)


def test_bfloat16() -> None:
    inputs = one_row(70, heads=3, dtype=torch.bfloat16)
    check_forward(inputs, FORM, state_limit=KERNEL_STATE[torch.bfloat16])
    check_gradients(inputs, FORM)


@pytest.mark.parametrize(
    ("tokens", "reverse"), [(64, False), (64, True), (128, False)], ids=["64", "64-reverse", "128"]
)
def test_segments_change_nothing(
    tokens: int, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segments(monkeypatch, tokens)
    # The last segment is short, has one chunk and a part of another.
    inputs = one_row(230, heads=2, kv_heads=1)
    inputs = with_decay(inputs, torch.tensor([-0.01]))
    check_forward(inputs, FORM, reverse=reverse)
    check_gradients(inputs, FORM, reverse=reverse)


@pytest.mark.parametrize("seq", [64, 65])
def test_segments_that_divide_or_just_miss_the_length(
    seq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segments(monkeypatch, 64)
    inputs = with_decay(make_inputs(seq, heads=1, state_rows=2), torch.tensor([0.0]))
    check_forward(inputs, FORM)
    check_gradients(inputs, FORM)


@pytest.mark.parametrize(
    ("seq", "reverse"), [(70, False), (130, True), (257, False)], ids=["70", "130-reverse", "257"]
)
def test_more_segments_than_the_tokens_fill(
    seq: int, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segment_count(monkeypatch, 8)
    inputs = with_decay(one_row(seq), torch.tensor([-0.02]))
    check_forward(inputs, FORM, reverse=reverse)
    check_gradients(inputs, FORM, reverse=reverse)


@pytest.mark.parametrize(
    ("decay", "reverse"), [(-0.12, False), (-0.36, False), (-1.0, True), (float("-inf"), False)]
)
def test_what_decays_over_segments_is_cut_off_without_a_trace(
    decay: float, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the carry leaves out as forgotten has to stay below the limits of float32, and what
    # was left out was not written.
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *given, **kind: fresh(*given, **kind).fill_(math.nan)
    )
    force_segments(monkeypatch, 64)
    inputs = with_decay(one_row(193), torch.tensor([decay]))
    inputs = inputs._replace(initial_state=inputs.initial_state * 30)
    check_forward(inputs, FORM, reverse=reverse)
    check_gradients(inputs, FORM, reverse=reverse)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(64, torch.int32), (ONE_SEGMENT, torch.int64)], ids=["64", "one_segment"]
)
def test_packed(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, tokens)
    inputs = make_inputs(169, batch=1, heads=2, kv_heads=1, state_rows=9)
    check_forward(inputs, FORM, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype))
    check_gradients(inputs, FORM, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "state_rows"), [(64, 9), (ONE_SEGMENT, None)], ids=["64-states", "one_segment"]
)
def test_packed_in_reverse(
    tokens: int, state_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_segments(monkeypatch, tokens)
    inputs = make_inputs(169, batch=1, heads=1, state_rows=state_rows)
    inputs = with_decay(inputs, torch.tensor([-0.02]))
    check_forward(inputs, FORM, cu_seqlens=torch.tensor(BOUNDS), reverse=True)
    check_gradients(inputs, FORM, cu_seqlens=torch.tensor(BOUNDS), reverse=True)


def test_packed_without_states_or_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, 64)
    inputs = make_inputs(300, decay="none", batch=1, heads=1)
    bounds = torch.tensor([0, 200, 200, 201, 300], dtype=torch.int32)
    check_forward(inputs, FORM, cu_seqlens=bounds)
    check_gradients(inputs, FORM, cu_seqlens=bounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_states_that_were_not_written_are_not_read(
    monkeypatch: pytest.MonkeyPatch, bounds: list[int] | None, reverse: bool
) -> None:
    """No state enters a sequence, and no gradient its end."""
    force_segments(monkeypatch, 32)
    inputs = one_row(169, heads=1)._replace(initial_state=None)
    kwargs = {"reverse": reverse}
    if bounds is not None:
        kwargs["cu_seqlens"] = torch.tensor(bounds)

    def outputs_alone(dtype: torch.dtype, form: str) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:4]]
        o, _ = linear_attention(*leaves, implementation=form, **kwargs)
        grads = torch.autograd.grad(o, leaves, gradients_of((o, o))[0])
        return [o.detach(), *grads]

    exact = outputs_alone(torch.float64, "reference")
    # New memory is NaN then.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = outputs_alone(torch.float32, FORM)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(found, exact, strict=True):
        assert_close(x, y, limit=FORMS_FLOAT32)


def test_many_more_sequences_than_tokens() -> None:
    bounds = torch.tensor([0] * 5 + [1] * 5 + [5] * 3)
    inputs = make_inputs(5, batch=1, heads=1, state_rows=12)
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


@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["plain", "packed"])
def test_no_tokens(bounds: list[int] | None) -> None:
    q, k, v, log_decay, state = make_inputs(0, batch=1, state_rows=2 if bounds else 1).leaves()
    o, final_state = linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state,
        cu_seqlens=None if bounds is None else torch.tensor(bounds),
        implementation=FORM,
    )
    assert o.shape == (1, 0, 2, 20)
    assert torch.equal(final_state, state)
    (o.sum() + final_state.sum()).backward()
    assert torch.equal(state.grad, torch.ones_like(state))


@pytest.mark.parametrize("position", [0, 63, 64])
def test_outputs_depend_on_no_later_token(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, 64)
    inputs = one_row(100)
    before = results(inputs)
    changed = [x.clone() for x in inputs[:3]]
    for x in changed:
        x[:, position] += 1.0
    after = results(inputs._replace(q=changed[0], k=changed[1], v=changed[2]))
    assert torch.equal(before[0][:, :position], after[0][:, :position])
    assert not torch.equal(before[0][:, position], after[0][:, position])
    # Gradients of keys and values come from no earlier query.
    for i in (3, 4):
        assert torch.equal(before[i][:, position + 1 :], after[i][:, position + 1 :])


@pytest.mark.parametrize("split", [0, 1, 64, 100])
def test_a_call_split_in_two_gives_the_same(split: int) -> None:
    q, k, v, log_decay, state = one_row(100)
    whole, whole_state = linear_attention(
        q, k, v, log_decay, initial_state=state, implementation=FORM
    )
    outputs = []
    for part in (slice(0, split), slice(split, 100)):
        o, state = linear_attention(
            q[:, part], k[:, part], v[:, part], log_decay, initial_state=state, implementation=FORM
        )
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole, limit=FORMS_FLOAT32)
    assert_close(state, whole_state, limit=FORMS_FLOAT32)


def test_nothing_of_one_sequence_reaches_another() -> None:
    inputs = make_inputs(169, batch=1, heads=1, state_rows=9)
    bounds = torch.tensor(BOUNDS)
    before = results(inputs, cu_seqlens=bounds)
    spoiled = [x.clone() for x in inputs[:3]]
    for x in spoiled:
        x[:, 71:135] = float("nan")
    after = results(Inputs(*spoiled, *inputs[3:]), cu_seqlens=bounds)
    for i in (0, 2, 3, 4):
        assert torch.equal(before[i][:, :71], after[i][:, :71])
        assert torch.equal(before[i][:, 135:], after[i][:, 135:])
    others = [n for n in range(9) if n != 5]
    for i in (1, 6):
        assert torch.equal(before[i][others], after[i][others])
    assert bool(after[1][5].isnan().any())
