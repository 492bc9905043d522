"""Gradients of q, k, v, log_decay and the initial state, also through the final state."""

import oracles
import pytest
import torch
from attention_cases import DECAYS, check_gradients, make_inputs
from tolerances import FORMS_GRADIENT_FLOAT64, assert_close
from torch.autograd import gradcheck

from transnormer.ops import linear_attention

FORMS = [
    *(("reference", decay) for decay in DECAYS),
    *(("chunked", decay) for decay in DECAYS),
    ("lightning1", "none"),
    ("lightning1", "constant"),
]


@pytest.mark.parametrize("seq", [1, 15, 64, 65, 257])
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_gradients_match_the_recurrence(form: str, decay: str, seq: int) -> None:
    check_gradients(make_inputs(seq, decay=decay, heads=5, state_rows=2), form)


@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_gradients_in_float64(form: str, decay: str) -> None:
    inputs = make_inputs(100, decay=decay, heads=5, state_rows=2, dtype=torch.float64)
    check_gradients(inputs, form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_gradients_in_half_precision(form: str, decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(70, decay=decay, heads=5, state_rows=2, dtype=dtype)
    check_gradients(inputs, form)


@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_gradients_sum_over_query_heads_that_share(form: str, decay: str) -> None:
    check_gradients(make_inputs(70, decay=decay, heads=6, kv_heads=2, state_rows=2), form)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_gradients_in_reverse(form: str, decay: str) -> None:
    check_gradients(make_inputs(70, decay=decay, state_rows=2), form, reverse=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_scale_enters_the_gradients(decay: str) -> None:
    check_gradients(make_inputs(70, decay=decay, state_rows=2), "chunked", scale=0.37)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_gradcheck(form: str, decay: str) -> None:
    inputs = make_inputs(
        5,
        decay=decay,
        batch=1,
        heads=2,
        kv_heads=1,
        key_dim=2,
        value_dim=3,
        state_rows=1,
        dtype=torch.float64,
    ).leaves()
    if inputs.log_decay is not None:
        # Finite differences need room on both sides of every entry.
        shape = inputs.log_decay.shape
        smooth = (-0.1 - torch.rand(shape, dtype=torch.float64)).requires_grad_()
        inputs = inputs._replace(log_decay=smooth)
    form = form if form == "reference" else "auto"

    def call(q, k, v, log_decay, state):
        return linear_attention(q, k, v, log_decay, initial_state=state, implementation=form)

    assert gradcheck(call, tuple(inputs))


@pytest.mark.parametrize("form", ["reference", "chunked", "lightning1"])
def test_gradients_equal_the_closed_formulas(form: str) -> None:
    q, k, v, log_decay, _ = make_inputs(130, heads=3, value_dim=16, dtype=torch.float64).leaves()
    log_decay = torch.tensor([-0.5, -0.01, 0.0], dtype=torch.float64)
    o, _ = linear_attention(q, k, v, log_decay, implementation=form)
    do = torch.randn_like(o)
    o.backward(do)
    exact = oracles.closed_gradients(q.detach(), k.detach(), v.detach(), log_decay, do)
    for name, x, grad in zip("qkv", (q, k, v), exact):
        assert_close(x.grad, grad, limit=FORMS_GRADIENT_FLOAT64, name=name)


@pytest.mark.parametrize("form", ["reference", "chunked", "lightning1"])
def test_only_the_final_state_is_used(form: str) -> None:
    inputs = make_inputs(70, state_rows=2)
    exact, actual = inputs.double().leaves(), inputs.leaves()
    _, state = oracles.linear_attention(*exact[:4], initial_state=exact.initial_state)
    state.square().sum().backward()
    _, state = linear_attention(
        *actual[:4], initial_state=actual.initial_state, implementation=form
    )
    state.square().sum().backward()
    assert_close(actual.k.grad, exact.k.grad, limit=1e-5)
    assert_close(actual.v.grad, exact.v.grad, limit=1e-5)
    assert_close(actual.log_decay.grad, exact.log_decay.grad, limit=1e-5)
    assert_close(actual.initial_state.grad, exact.initial_state.grad, limit=1e-5)
    assert actual.q.grad is None or bool((actual.q.grad == 0).all())


@pytest.mark.parametrize("decay", DECAYS)
def test_unused_gradients_are_not_asked_for(decay: str) -> None:
    q, k, v, log_decay, state = make_inputs(70, decay=decay, state_rows=2)
    v.requires_grad_()
    o, _ = linear_attention(q, k, v, log_decay, initial_state=state)
    o.sum().backward()
    assert v.grad is not None
    assert q.grad is None
    assert state.grad is None


@pytest.mark.parametrize("decay", ["constant", "token", "key"])
def test_log_decay_gradient_has_its_dtype(decay: str) -> None:
    q, k, v, log_decay, _ = make_inputs(20, decay=decay, dtype=torch.bfloat16)
    log_decay = log_decay.clamp(min=-1).bfloat16().requires_grad_()
    linear_attention(q, k, v, log_decay)[0].sum().backward()
    assert log_decay.grad.dtype == torch.bfloat16
