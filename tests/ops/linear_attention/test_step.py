"""One to eight tokens against a state give what the whole sequence gives."""

import oracles
import pytest
import torch
from attention_cases import DECAYS, make_inputs
from tolerances import OUTPUT, STATE, assert_close
from torch import Tensor

from transnormer.ops import checks, linear_attention, linear_attention_step

GATED = ("token", "key")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_match_the_recurrence(decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(12, decay=decay, heads=6, kv_heads=3, state_rows=2, dtype=dtype)
    q, k, v, log_decay, state = inputs
    exact, exact_state = oracles.linear_attention(*inputs[:4], initial_state=state, scale=0.5)
    outputs = []
    for t in range(12):
        decays = log_decay[:, t] if decay in GATED else log_decay
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], decays, state, scale=0.5)
        assert o.shape == (2, 6, 20)
        assert o.dtype == dtype
        outputs.append(o)
    assert_close(torch.stack(outputs, 1), exact, limit=OUTPUT[dtype])
    assert_close(state, exact_state, limit=STATE[dtype])


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("decay", DECAYS)
def test_several_tokens_at_once_are_as_many_steps(decay: str, tokens: int) -> None:
    q, k, v, log_decay, state = make_inputs(tokens, decay=decay, state_rows=2)
    o, final_state = linear_attention_step(q, k, v, log_decay, state)
    exact, exact_state = oracles.linear_attention(q, k, v, log_decay, initial_state=state)
    assert_close(o, exact)
    assert_close(final_state, exact_state)


@pytest.mark.parametrize("decay", DECAYS)
def test_prefill_then_steps_is_the_whole_call(decay: str) -> None:
    q, k, v, log_decay, _ = make_inputs(80, decay=decay)
    whole, whole_state = linear_attention(q, k, v, log_decay)
    gates = log_decay if decay in GATED else None
    prefix = [x[:, :65] for x in (q, k, v)]
    o, state = linear_attention(*prefix, log_decay if gates is None else gates[:, :65])
    outputs = [o]
    for t in range(65, 80):
        decays = log_decay if gates is None else gates[:, t]
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], decays, state)
        outputs.append(o[:, None])
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(state, whole_state)


def test_state_is_left_alone_unless_asked() -> None:
    q, k, v, log_decay, state = make_inputs(1, state_rows=2)
    before = state.clone()
    _, after = linear_attention_step(q, k, v, log_decay, state)
    assert torch.equal(state, before)
    assert after is not state


def test_inplace_updates_the_state_itself() -> None:
    q, k, v, log_decay, state = make_inputs(4, state_rows=2)
    exact_o, exact_state = linear_attention_step(q, k, v, log_decay, state)
    o, after = linear_attention_step(q, k, v, log_decay, state, inplace=True)
    assert after.data_ptr() == state.data_ptr()
    assert torch.equal(state, exact_state)
    assert torch.equal(o, exact_o)


@pytest.mark.parametrize("decay", DECAYS)
def test_slots_read_and_write_their_rows_of_the_pool(decay: str) -> None:
    q, k, v, log_decay, _ = make_inputs(2, decay=decay, batch=3)
    pool = torch.randn(5, 2, 16, 20)
    before = pool.clone()
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    o, after = linear_attention_step(q, k, v, log_decay, pool, slots=slots)
    assert after.data_ptr() == pool.data_ptr()
    used, rows = [4, 0], [0, 2]
    decays = log_decay[rows] if decay in GATED else log_decay
    exact_o, exact_state = linear_attention_step(q[rows], k[rows], v[rows], decays, before[used])
    assert_close(o[rows], exact_o)
    assert_close(pool[used], exact_state)
    assert torch.equal(pool[[1, 2, 3]], before[[1, 2, 3]])
    assert bool((o[1] == 0).all())


def test_all_slots_skipped_touch_nothing() -> None:
    q, k, v, log_decay, _ = make_inputs(1, batch=2)
    pool = torch.randn(3, 2, 16, 20)
    before = pool.clone()
    slots = torch.tensor([-1, -1], dtype=torch.int32)
    linear_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, pool, slots=slots)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_are_differentiable(decay: str) -> None:
    inputs = make_inputs(6, decay=decay, state_rows=2, dtype=torch.float64)
    exact, actual = inputs.leaves(), inputs.leaves()
    o, state = oracles.linear_attention(*exact[:4], initial_state=exact.initial_state)
    (o.square().sum() + state.square().sum()).backward()
    o, state = linear_attention_step(*actual)
    (o.square().sum() + state.square().sum()).backward()
    for name, x, y in zip(inputs._fields, actual, exact):
        if x is not None:
            assert_close(x.grad, y.grad, limit=1e-11, name=name)


def test_two_tokens_are_not_taken_for_a_row() -> None:
    # heads and tokens of equal count: the rank alone tells the two layouts apart.
    q, k, v, log_decay, state = make_inputs(2, heads=2, batch=2, state_rows=2)
    o, _ = linear_attention_step(q, k, v, log_decay, state)
    exact, _ = oracles.linear_attention(q, k, v, log_decay, initial_state=state)
    assert_close(o, exact)


def test_a_slot_is_used_once() -> None:
    q, pool = torch.randn(2, 1, 16), torch.zeros(3, 1, 16, 16)
    with pytest.raises(ValueError, match="each at most once"):
        linear_attention_step(q, q, q, None, pool, slots=torch.tensor([1, 1], dtype=torch.int32))


def test_rows_that_share_memory_are_not_updated_in_place() -> None:
    q, state = torch.randn(2, 1, 16), torch.zeros(1, 1, 16, 16).expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="rows of their own"):
        linear_attention_step(q, q, q, None, state, inplace=True)


def test_dims_of_size_1_may_have_any_stride() -> None:
    q, state = torch.randn(1, 1, 16), torch.zeros(16, 16).as_strided((1, 1, 16, 16), (0, 0, 16, 1))
    o, after = linear_attention_step(q, q, q, None, state, inplace=True)
    assert after is state
    assert_close(o, oracles.linear_attention(*[q[:, None]] * 3)[0][:, 0])


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_empty_batch_leaves_the_pool(tokens: int) -> None:
    q, pool = torch.randn(0, tokens, 4, 16), torch.randn(3, 4, 16, 16)
    before, slots = pool.clone(), torch.zeros(0, dtype=torch.int32)
    o, _ = linear_attention_step(q, q, q, None, pool, slots=slots)
    assert o.shape == q.shape
    assert torch.equal(pool, before)


def test_a_slot_below_minus_1_shows_where_values_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "values_are_visible", lambda _: False)
    q, pool = torch.randn(3, 1, 16), torch.randn(2, 1, 16, 16)
    before, slots = pool.clone(), torch.tensor([-2, -1, 1], dtype=torch.int32)
    o, _ = linear_attention_step(q, q, q, None, pool, slots=slots)
    assert bool(o[0].isnan().all())
    assert bool((o[1] == 0).all())
    assert bool(o[2].isfinite().all())
    assert torch.equal(pool[0], before[0])


def test_a_pool_of_another_shape_is_named_as_one() -> None:
    q, pool = torch.randn(2, 1, 16), torch.zeros(3, 1, 16, 12)
    with pytest.raises(ValueError, match=r"\(num_slots 3, kv_heads 1, key_dim 16, value_dim 16\)"):
        linear_attention_step(q, q, q, None, pool, slots=torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize("with_slots", [False, True], ids=["state", "pool"])
def test_gradients_pass_through_steps_in_place(with_slots: bool) -> None:
    inputs = make_inputs(4, state_rows=2, dtype=torch.float64)
    slots = torch.tensor([0, 1], dtype=torch.int32) if with_slots else None

    def gradients(needed: str, inplace: bool) -> tuple[Tensor, ...]:
        arguments = inputs._asdict()
        leaves = [arguments[name].clone().requires_grad_() for name in needed.split()]
        arguments |= dict(zip(needed.split(), leaves, strict=True))
        state, total = arguments.pop("initial_state").clone(), 0.0
        where = {"slots": slots, "inplace": True} if inplace else {}
        for _ in range(2):
            o, state = linear_attention_step(**arguments, state=state, **where)
            total = total + o.square().sum()
        return torch.autograd.grad(total + state.square().sum(), leaves)

    needed = "q k v log_decay" if with_slots else "q k v"
    for x, y in zip(gradients(needed, True), gradients(needed, False), strict=True):
        assert_close(x, y, limit=1e-11)
    if not with_slots:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients("log_decay", True)
