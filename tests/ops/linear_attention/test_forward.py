"""Every implementation computes the recurrence, for any length, decay, head count and dtype."""

import oracles
import pytest
import torch
from attention_cases import DECAYS, LENGTHS, check_forward, make_inputs
from tolerances import FORMS_FLOAT32, assert_close

from transnormer.ops import linear_attention

FORMS = [
    *(("reference", decay) for decay in DECAYS),
    *(("chunked", decay) for decay in DECAYS),
    ("lightning1", "none"),
    ("lightning1", "constant"),
]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("seq", LENGTHS, ids=lambda n: f"seq{n}")
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_form_matches_the_recurrence(form: str, decay: str, seq: int) -> None:
    check_forward(make_inputs(seq, decay=decay, batch=2, heads=5), form)


@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_form_starts_from_the_initial_state(form: str, decay: str) -> None:
    check_forward(make_inputs(100, decay=decay, state_rows=2), form)


@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_one_head_of_one_row(form: str, decay: str) -> None:
    check_forward(make_inputs(65, decay=decay, batch=1, heads=1), form)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_query_heads_share_key_value_heads(
    form: str, decay: str, heads: int, kv_heads: int
) -> None:
    inputs = make_inputs(70, decay=decay, heads=heads, kv_heads=kv_heads, state_rows=2)
    check_forward(inputs, form)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_other_dtypes_keep_their_precision(form: str, decay: str, dtype: torch.dtype) -> None:
    check_forward(make_inputs(130, decay=decay, heads=5, state_rows=2, dtype=dtype), form)


@pytest.mark.parametrize("form", ["reference", "chunked", "lightning1"])
def test_scale_acts_on_outputs_only(form: str) -> None:
    check_forward(make_inputs(70, state_rows=2), form, scale=0.37)


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("decay", ["none", "constant"])
def test_dense_tiles_chunks_and_recurrence_agree(seq: int, decay: str) -> None:
    q, k, v, log_decay, _ = make_inputs(seq, decay=decay, heads=5)
    slopes = torch.zeros(5) if log_decay is None else log_decay
    dense = oracles.dense_linear_attention(q, k, v, slopes)
    for form in ("reference", "lightning1", "chunked"):
        o, _ = linear_attention(q, k, v, log_decay, implementation=form)
        assert_close(o, dense, limit=FORMS_FLOAT32, name=form)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(3, 5), (1, 1), (10, 300), (260, 16)])
def test_odd_sizes_run_by_choice(decay: str, key_dim: int, value_dim: int) -> None:
    inputs = make_inputs(20, decay=decay, heads=1, key_dim=key_dim, value_dim=value_dim)
    check_forward(inputs, "auto")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 512), (256, 16), (64, 64), (20, 36)])
def test_supported_sizes_run_chunked(decay: str, key_dim: int, value_dim: int) -> None:
    inputs = make_inputs(40, decay=decay, heads=1, key_dim=key_dim, value_dim=value_dim)
    check_forward(inputs, "chunked")


@pytest.mark.parametrize("decay", DECAYS)
def test_strong_decay_over_a_long_sequence_stays_finite(decay: str) -> None:
    q, k, v, log_decay, _ = make_inputs(600, decay=decay)
    if log_decay is not None:
        log_decay = torch.full_like(log_decay, -50.0)
    check_forward(make_inputs(600, decay=decay)._replace(q=q, k=k, v=v, log_decay=log_decay))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["auto", "reference", "chunked"])
def test_no_history_at_all_leaves_each_token_alone(form: str, decay: str) -> None:
    if decay == "none":
        decay = "constant"
    q, k, v, log_decay, state = make_inputs(70, decay=decay, state_rows=2)
    alone = torch.full_like(log_decay, float("-inf"))
    o, final_state = linear_attention(q, k, v, alone, initial_state=state, implementation=form)
    assert_close(o, (q.double() * k.double()).sum(-1, keepdim=True) * v.double())
    assert_close(final_state, k[:, -1, :, :, None].double() * v[:, -1, :, None, :].double())


@pytest.mark.parametrize("form", ["auto", "reference", "chunked", "lightning1"])
def test_length_zero_passes_the_state_through(form: str) -> None:
    q, k, v, log_decay, state = make_inputs(0, state_rows=2)
    o, final_state = linear_attention(q, k, v, log_decay, initial_state=state, implementation=form)
    assert o.shape == (2, 0, 2, 20)
    assert torch.equal(final_state, state)
    _, final_state = linear_attention(q, k, v, log_decay, implementation=form)
    assert torch.equal(final_state, torch.zeros_like(state))


@pytest.mark.parametrize("form", ["auto", "reference", "chunked", "lightning1"])
def test_strided_inputs_need_no_copy_by_the_caller(form: str) -> None:
    inputs = make_inputs(70, batch=2, heads=3)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    check_forward(inputs._replace(q=strided[0], k=strided[1], v=strided[2]), form)


@pytest.mark.parametrize("form", ["auto", "reference", "chunked", "lightning1"])
def test_inputs_are_left_as_they_were(form: str) -> None:
    inputs = make_inputs(70, state_rows=2)
    before = [x.clone() for x in inputs]
    linear_attention(*inputs[:4], initial_state=inputs.initial_state, implementation=form)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_reverse_runs_from_the_last_token_to_the_first(form: str, decay: str) -> None:
    check_forward(make_inputs(100, decay=decay, state_rows=2), form, reverse=True)
