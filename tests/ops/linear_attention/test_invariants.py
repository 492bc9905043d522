"""What must hold whatever the numbers are: causality, split invariance, repeatability."""

import pytest
import torch
from attention_cases import DECAYS, make_inputs
from tolerances import FORMS_FLOAT32, assert_close

from transnormer.ops import linear_attention

FORMS = [
    *(("reference", decay) for decay in DECAYS),
    *(("chunked", decay) for decay in DECAYS),
    ("lightning1", "constant"),
]


@pytest.mark.parametrize("position", [0, 63, 64, 65, 149])
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_outputs_depend_on_no_later_token(form: str, decay: str, position: int) -> None:
    q, k, v, log_decay, _ = make_inputs(150, decay=decay)
    before, _ = linear_attention(q, k, v, log_decay, implementation=form)
    q, k, v = q.clone(), k.clone(), v.clone()
    for x in (q, k, v):
        x[:, position] += 1.0
    if decay in ("token", "key"):
        log_decay = log_decay.clone()
        log_decay[:, position:] = -0.7
    after, _ = linear_attention(q, k, v, log_decay, implementation=form)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("split", [0, 1, 63, 64, 65, 130, 150])
@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_a_call_split_in_two_gives_the_same(form: str, decay: str, split: int) -> None:
    q, k, v, log_decay, state = make_inputs(150, decay=decay, state_rows=2)
    whole, whole_state = linear_attention(
        q, k, v, log_decay, initial_state=state, implementation=form
    )
    outputs = []
    for part in (slice(0, split), slice(split, 150)):
        decays = log_decay[:, part] if decay in ("token", "key") else log_decay
        o, state = linear_attention(
            q[:, part], k[:, part], v[:, part], decays, initial_state=state, implementation=form
        )
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole, limit=FORMS_FLOAT32)
    assert_close(state, whole_state, limit=FORMS_FLOAT32)


@pytest.mark.parametrize(("form", "decay"), FORMS, ids=str)
def test_runs_repeat_bit_for_bit(form: str, decay: str) -> None:
    inputs = make_inputs(200, decay=decay, state_rows=2)
    runs = []
    for _ in range(2):
        leaves = inputs.leaves()
        o, state = linear_attention(
            *leaves[:4], initial_state=leaves.initial_state, implementation=form
        )
        (o.sum() + state.square().sum()).backward()
        runs.append([o, state, *(x.grad for x in leaves if x is not None)])
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@pytest.mark.parametrize("decay", DECAYS)
def test_rows_of_a_batch_do_not_meet(decay: str) -> None:
    q, k, v, log_decay, state = make_inputs(100, decay=decay, batch=3, state_rows=3)
    whole, states = linear_attention(q, k, v, log_decay, initial_state=state)
    for i in range(3):
        row = slice(i, i + 1)
        decays = log_decay[row] if decay in ("token", "key") else log_decay
        o, final_state = linear_attention(q[row], k[row], v[row], decays, initial_state=state[row])
        assert_close(o, whole[row], name=f"row {i}")
        assert_close(final_state, states[row], name=f"state {i}")


@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_the_gated_forms_contain_the_constant_one(form: str) -> None:
    q, k, v, log_decay, state = make_inputs(100, heads=3, state_rows=2)
    log_decay = torch.tensor([-0.5, -0.01, 0.0])
    per_token = log_decay.expand(2, 100, 3)
    per_key = per_token[..., None].expand(2, 100, 3, 16)
    constant = linear_attention(q, k, v, log_decay, initial_state=state, implementation=form)
    for gated in (per_token, per_key):
        o, final_state = linear_attention(q, k, v, gated, initial_state=state, implementation=form)
        assert_close(o, constant[0], limit=FORMS_FLOAT32)
        assert_close(final_state, constant[1], limit=FORMS_FLOAT32)


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_is_written_to_unwritten_memory(decay: str) -> None:
    # Fresh memory holds NaN in this suite: a short last chunk that reads it would show here.
    o, state = linear_attention(*make_inputs(77, decay=decay)[:4])
    assert bool(torch.isfinite(o).all())
    assert bool(torch.isfinite(state).all())


def test_states_and_their_gradients_may_have_any_strides() -> None:
    q, k, v, log_decay, _ = make_inputs(70)
    plain = torch.randn(1, *linear_attention(q, k, v)[1].shape[1:])
    shared = plain.expand(2, -1, -1, -1)
    results = []
    for state in (shared, shared.contiguous()):
        leaf = v.detach().requires_grad_()
        o, final_state = linear_attention(q, k, leaf, log_decay, initial_state=state)
        weight = torch.arange(final_state.numel()).view(final_state.transpose(0, 1).shape)
        (final_state.transpose(0, 1) * weight).sum().backward()
        results.append((o, final_state, leaf.grad))
        leaf.grad = None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_empty_sequences_do_not_shorten_the_chunks() -> None:
    q, k, v, log_decay, _ = make_inputs(300, batch=1)
    alone, _ = linear_attention(q, k, v, log_decay)
    bounds = torch.tensor([0] * 200 + [300] * 200)
    packed, _ = linear_attention(q, k, v, log_decay, cu_seqlens=bounds)
    # Other chunks would round otherwise.
    assert torch.equal(packed, alone)
