"""Sequences packed along seq give what each gives alone, with empty and 1-token ones among them."""

import pytest
import torch
from attention_cases import DECAYS, check_forward, check_gradients, make_inputs
from tolerances import assert_close

from transnormer.ops import linear_attention

# Lengths 0, 1, 70, 0, 0, 64, 1, 33, 0: empty at both ends and twice in a row.
BOUNDS = [0, 0, 1, 71, 71, 71, 135, 136, 169, 169]
FORMS = ["reference", "chunked"]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_matches_the_recurrence(form: str, decay: str, index_dtype: torch.dtype) -> None:
    inputs = make_inputs(169, decay=decay, batch=1, heads=4, kv_heads=2, state_rows=9)
    check_forward(inputs, form, cu_seqlens=torch.tensor(BOUNDS, dtype=index_dtype))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_reverse_flips_each_sequence(form: str, decay: str) -> None:
    inputs = make_inputs(169, decay=decay, batch=1, state_rows=9)
    check_forward(inputs, form, cu_seqlens=torch.tensor(BOUNDS), reverse=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_gradients_match_the_recurrence(form: str, decay: str, reverse: bool) -> None:
    inputs = make_inputs(169, decay=decay, batch=1, heads=4, kv_heads=2, state_rows=9)
    check_gradients(inputs, form, cu_seqlens=torch.tensor(BOUNDS), reverse=reverse)


@pytest.mark.parametrize("form", ["auto", "reference", "chunked"])
def test_empty_sequences_pass_their_state_and_its_gradient_through(form: str) -> None:
    q, k, v, log_decay, state = make_inputs(10, batch=1, state_rows=3)
    state.requires_grad_()
    _, final_state = linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state,
        cu_seqlens=torch.tensor([0, 0, 10, 10]),
        implementation=form,
    )
    assert torch.equal(final_state[[0, 2]], state[[0, 2]])
    final_state.sum().backward()
    assert torch.equal(state.grad[[0, 2]], torch.ones_like(state[[0, 2]]))


@pytest.mark.parametrize("form", FORMS)
def test_all_sequences_empty(form: str) -> None:
    q, k, v, log_decay, state = make_inputs(0, batch=1, state_rows=2)
    o, final_state = linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state,
        cu_seqlens=torch.tensor([0, 0, 0]),
        implementation=form,
    )
    assert o.shape == (1, 0, 2, 20)
    assert torch.equal(final_state, state)


@pytest.mark.parametrize("form", FORMS)
def test_one_packed_sequence_is_the_plain_call(form: str) -> None:
    inputs = make_inputs(150, batch=1, state_rows=1)
    arguments = {"initial_state": inputs.initial_state, "implementation": form}
    plain = linear_attention(*inputs[:4], **arguments)
    packed = linear_attention(*inputs[:4], **arguments, cu_seqlens=torch.tensor([0, 150]))
    assert_close(packed[0], plain[0])
    assert_close(packed[1], plain[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_token_never_reaches_another_sequence(form: str) -> None:
    q, k, v, log_decay, _ = make_inputs(90, decay="none", batch=1)
    bounds = torch.tensor([0, 30, 60, 90])
    before, state = linear_attention(q, k, v, cu_seqlens=bounds, implementation=form)
    k, v = k.clone(), v.clone()
    k[:, 30:60], v[:, 30:60] = 1e6, -1e6
    after, changed = linear_attention(q, k, v, cu_seqlens=bounds, implementation=form)
    assert torch.equal(before[:, :30], after[:, :30])
    assert torch.equal(before[:, 60:], after[:, 60:])
    assert torch.equal(state[[0, 2]], changed[[0, 2]])
    assert not torch.equal(state[1], changed[1])
