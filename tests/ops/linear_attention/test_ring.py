"""A ring beside a state gives what the recurrence gives, also after tokens are taken back."""

import random
from collections.abc import Callable

import oracles
import pytest
import torch
from attention_cases import make_inputs, make_log_decay
from tolerances import OUTPUT, STATE, assert_close
from torch import Tensor

from transnormer.ops import checks, linear_attention_ring_step
from transnormer.ops.linear_attention import decode_ops
from transnormer.ops.linear_attention.ring import RingState

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("plain", "kernel")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the public function in PyTorch, or with the kernels, interpreted on a CPU."""
    monkeypatch.setattr(decode_ops, "runs_kernel", lambda *_: request.param == "kernel")
    return request.param


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


class Histories:
    """Rows of a pool by the oracle: the float64 state after each token a row has kept."""

    def __init__(self, states: Tensor, log_decay: Tensor | None) -> None:
        self.states = [[state] for state in states.double().cpu()]
        self.newest = [0] * len(self.states)
        self.log_decay = None if log_decay is None else log_decay.cpu()

    def step(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One row's tokens; returns their outputs."""
        outputs, history = [], self.states[slot]
        for t in range(q.shape[0]):
            token = [x[None, t : t + 1].cpu() for x in (q, k, v)]
            o, state = oracles.linear_attention(
                *token, self.log_decay, initial_state=history[-1][None]
            )
            outputs.append(o[0, 0])
            history.append(state[0])
        self.newest[slot] = max(self.newest[slot], len(history) - 1)
        return torch.stack(outputs)

    def guaranteed(self, slot: int, capacity: int) -> int:
        """How many tokens the class says can be dropped at least."""
        seen = len(self.states[slot]) - 1
        return max(0, min(seen, capacity // 2 - (self.newest[slot] - seen)))


@pytest.mark.parametrize("capacity", [16, 6])
def test_fifty_random_steps_with_rollbacks(form: str, capacity: int) -> None:
    pool, batch, draw = 3, 2, random.Random(0)
    log_decay = torch.tensor([-1e-6 if capacity == 6 else -0.3]).to(DEVICE)
    state = torch.randn(pool, 1, 16, 12, device=DEVICE)
    ring = RingState.from_state(state.clone(), capacity=capacity)
    exact = Histories(state, log_decay)
    for _ in range(50):
        tokens = draw.choice([1, 1, draw.randint(1, capacity // 2)])
        shape = {"heads": 1, "value_dim": 12}
        q, k, v, _, _ = on_device(*make_inputs(tokens, batch=batch, **shape))
        slots = draw.sample([*range(pool), -1], batch)
        given = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        o = linear_attention_ring_step(q, k, v, log_decay, ring, slots=given).cpu()
        for row, slot in enumerate(slots):
            if slot == -1:
                assert bool((o[row] == 0).all())
            else:
                assert_close(o[row], exact.step(slot, q[row], k[row], v[row]))
        least = [exact.guaranteed(slot, capacity) for slot in range(pool)]
        assert all(n >= m for n, m in zip(ring.length.tolist(), least, strict=True))
        dropped = [draw.choice([0, 0, draw.randint(0, n)]) for n in least]
        ring.roll_back(torch.tensor(dropped, device=DEVICE))
        for slot, n in enumerate(dropped):
            exact.states[slot] = exact.states[slot][: len(exact.states[slot]) - n]
    expected = torch.stack([states[-1] for states in exact.states])
    assert_close(ring.fold(log_decay).cpu(), expected, limit=STATE[torch.float32])
    assert min(exact.newest) > capacity, "rows that never fold show little"


@pytest.mark.parametrize(
    ("decay", "dtype"),
    [("none", torch.float32), ("constant", torch.float32), ("constant", torch.float16)],
    ids=["none-fp32", "constant-fp32", "constant-fp16"],
)
def test_ring_steps_match_the_recurrence(form: str, decay: str, dtype: torch.dtype) -> None:
    shape = {"heads": 10, "kv_heads": 5, "key_dim": 20, "value_dim": 12}
    inputs = make_inputs(20, decay=decay, batch=1, state_rows=1, dtype=dtype, **shape)
    exact, exact_state = oracles.linear_attention(
        *inputs[:4], initial_state=inputs.initial_state, scale=0.5
    )
    q, k, v, log_decay, state = on_device(*inputs)
    ring, outputs = RingState.from_state(state, capacity=10, dtype=dtype), []
    # What no token has filled is never read.
    ring.keys.fill_(float("nan"))
    ring.values.fill_(float("nan"))
    for t in range(0, 20, 5):
        part = [x[:, t : t + 5] for x in (q, k, v)]
        outputs.append(linear_attention_ring_step(*part, log_decay, ring, scale=0.5))
    o = torch.cat(outputs, 1)
    assert o.dtype == dtype
    assert_close(o.cpu(), exact, limit=OUTPUT[dtype], name="o")
    assert_close(ring.fold(log_decay).cpu(), exact_state, limit=STATE[dtype], name="state")


@pytest.mark.parametrize("tokens", range(1, 9))
def test_a_full_ring_takes_one_to_eight_tokens(form: str, tokens: int) -> None:
    # 16 entries, the most a ring can hold, then tokens that make it fold.
    inputs = make_inputs(16 + tokens, heads=1, batch=1, value_dim=16, state_rows=1)
    exact, _ = oracles.linear_attention(*inputs[:4], initial_state=inputs.initial_state)
    q, k, v, log_decay, state = on_device(*inputs)
    ring = RingState.from_state(state)
    for part in (slice(0, 8), slice(8, 16), slice(16, None)):
        o = linear_attention_ring_step(q[:, part], k[:, part], v[:, part], log_decay, ring)
    assert_close(o.cpu(), exact[:, 16:])
    assert ring.length.tolist() == [8 + tokens]
    assert ring.start.tolist() == [8]


def test_a_state_is_written_once_in_half_a_ring(form: str) -> None:
    ring = RingState.from_state(torch.randn(2, 1, 16, 16, device=DEVICE), capacity=6)
    writes = []
    for step in range(20):
        before = ring.state.clone()
        q = torch.randn(2, 1, 16, device=DEVICE)
        o = linear_attention_ring_step(q, q, q, None, ring)
        assert o.shape == (2, 1, 16)
        if not torch.equal(before, ring.state):
            writes.append(step)
    assert writes == [6, 9, 12, 15, 18]


def test_strided_inputs_and_states(form: str) -> None:
    inputs = make_inputs(8, heads=2, batch=2, key_dim=16, value_dim=16, state_rows=2)
    exact, _ = oracles.linear_attention(*inputs[:4], initial_state=inputs.initial_state)
    q, k, v, log_decay, state = on_device(*inputs)
    views = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2).split(16, -1)
    ring = RingState.from_state(state.transpose(2, 3).contiguous().transpose(2, 3), capacity=8)
    outputs = [
        linear_attention_ring_step(*(x[:, t : t + 4] for x in views), log_decay, ring)
        for t in (0, 4)
    ]
    assert_close(torch.cat(outputs, 1).cpu(), exact)


def test_rows_that_no_slot_names_are_untouched(form: str) -> None:
    ring = RingState.from_state(torch.randn(4, 1, 16, 16, device=DEVICE), capacity=4)
    for x in (ring.keys, ring.values):
        x.normal_()
    ring.length.fill_(4)
    before = RingState(*(x.clone() for x in ring))
    q = torch.randn(3, 1, 16, device=DEVICE)
    slots = torch.tensor([-1, 2, -1], dtype=torch.int32, device=DEVICE)
    linear_attention_ring_step(q, q, q, None, ring, slots=slots)
    for x, y in zip(ring, before, strict=True):
        assert torch.equal(x[[0, 1, 3]], y[[0, 1, 3]])
        assert not torch.equal(x[2], y[2])
    linear_attention_ring_step(q, q, q, None, before, slots=torch.full_like(slots, -1))
    assert before.length.tolist() == [4] * 4


def test_a_row_rolled_back_too_far_shows(form: str) -> None:
    ring = RingState.empty(2, 1, 16, 16, device=DEVICE)
    ring.length[0] = -1
    before = RingState(*(x.clone() for x in ring))
    q = torch.randn(2, 1, 16, device=DEVICE)
    o = linear_attention_ring_step(q, q, q, None, ring)
    assert bool(o[0].isnan().all())
    assert bool(o[1].isfinite().all())
    assert all(torch.equal(x[0], y[0]) for x, y in zip(ring, before, strict=True))
    folded = ring.fold(None)
    assert bool(folded[0].isnan().all())
    assert bool(folded[1].isfinite().all())


def test_more_tokens_than_the_ring_holds_cannot_be_dropped() -> None:
    ring = RingState.empty(2, 1, 16, 16)
    ring.length.fill_(3)
    with pytest.raises(ValueError, match=r"tokens is \[0, 4\].*hold \[3, 3\]"):
        ring.roll_back(4, slots=torch.tensor([1, -1]))
    for tokens in (-1, 17):
        with pytest.raises(ValueError, match=f"tokens is {tokens}; expected 0 to"):
            ring.roll_back(tokens)
    ring.roll_back(torch.tensor([2, 3]), slots=torch.tensor([1, -1], dtype=torch.int32))
    assert ring.length.tolist() == [3, 1]


def test_tokens_to_drop_are_integers_on_the_rings_device() -> None:
    ring = RingState.empty(2, 1, 16, 16)
    ring.length.fill_(3)
    for tokens in (1.5, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"^tokens is .*; expected (an int|integers)"):
            ring.roll_back(tokens)
    with pytest.raises(ValueError, match="tokens is on meta; expected cpu"):
        ring.roll_back(torch.ones(2, dtype=torch.int32, device="meta"))
    ring.roll_back(1)
    ring.roll_back(1, slots=torch.tensor([1]))
    assert ring.length.tolist() == [2, 1]


def test_an_int_is_not_copied_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("as_tensor waits for a GPU")

    ring = RingState.empty(2, 1, 16, 16)
    ring.length.fill_(3)
    for name in ("as_tensor", "tensor"):
        monkeypatch.setattr(torch, name, refuse)
    ring.roll_back(1)
    assert ring.length.tolist() == [2, 2]


def test_fold_refuses_the_decays_that_steps_refuse() -> None:
    ring = RingState.empty(2, 4, 16, 16)
    for log_decay, error, match in (
        (torch.zeros(1), ValueError, "log_decay has shape"),
        (torch.ones(4), ValueError, "log_decay holds 1.0"),
        (torch.zeros(2, 4), NotImplementedError, "one decay per head"),
        (torch.zeros(4, dtype=torch.int32), TypeError, "log_decay is torch.int32"),
        (-0.5, TypeError, "log_decay is float"),
    ):
        with pytest.raises(error, match=match):
            ring.fold(log_decay)


def test_fold_sums_in_float32_under_autocast() -> None:
    ring = RingState.from_state(torch.randn(2, 1, 16, 16, device=DEVICE))
    for x in (ring.keys, ring.values):
        x.normal_()
    ring.length.fill_(16)
    exact = ring.fold(None)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(ring.fold(None), exact)


def test_an_empty_batch_leaves_the_rings(form: str) -> None:
    ring = RingState.empty(3, 1, 16, 16, device=DEVICE)
    before = RingState(*(x.clone() for x in ring))
    q = torch.randn(0, 2, 1, 16, device=DEVICE)
    slots = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    o = linear_attention_ring_step(q, q, q, None, ring, slots=slots)
    assert o.shape == q.shape
    assert all(torch.equal(x, y) for x, y in zip(ring, before, strict=True))


def test_a_slot_outside_the_pool_shows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "values_are_visible", lambda _: False)
    ring = RingState.empty(2, 1, 16, 16, device=DEVICE)
    q = torch.randn(3, 1, 16, device=DEVICE)
    slots = torch.tensor([-2, -1, 1], dtype=torch.int32, device=DEVICE)
    o = linear_attention_ring_step(q, q, q, None, ring, slots=slots)
    assert bool(o[0].isnan().all())
    assert bool((o[1] == 0).all())
    assert bool(o[2].isfinite().all())
    assert ring.length.tolist() == [0, 1]


def test_slots_of_any_stride_are_read(form: str) -> None:
    q = torch.randn(2, 1, 16, device=DEVICE)
    slots = torch.tensor([2, -1, 0, -1], dtype=torch.int32, device=DEVICE)[::2]
    ring = RingState.empty(3, 1, 16, 16, device=DEVICE)
    linear_attention_ring_step(q, q, q, None, ring, slots=slots)
    assert ring.length.tolist() == [1, 0, 1]
    assert torch.equal(ring.keys[[2, 0], 0], q)


@pytest.mark.parametrize("name", RingState._fields)
def test_rings_that_share_memory_are_refused(name: str) -> None:
    ring = RingState.empty(2, 4, 16, 16)
    shared = ring._replace(**{name: getattr(ring, name)[:1].expand_as(getattr(ring, name))})
    with pytest.raises(ValueError, match=rf"^ring\.{name} has strides .*ring\.{name}\.clone"):
        call(ring=shared)()
    if name == "state":
        with pytest.raises(ValueError, match=r"^state has strides .*pass state\.clone"):
            RingState.from_state(shared.state, capacity=2)


def test_a_ring_of_one_row_may_have_any_stride() -> None:
    q = torch.randn(1, 1, 16)
    ring = RingState.empty(1, 1, 16, 16)
    ring = RingState(*(x.as_strided(x.shape, (0, *x.stride()[1:])) for x in ring))
    assert bool(linear_attention_ring_step(q, q, q, None, ring).isfinite().all())


def test_fold_leaves_the_rings_and_takes_slots(form: str) -> None:
    inputs = make_inputs(5, batch=3, state_rows=3)
    q, k, v, log_decay, state = on_device(*inputs)
    ring = RingState.from_state(state)
    linear_attention_ring_step(q, k, v, log_decay, ring)
    before = RingState(*(x.clone() for x in ring))
    whole = ring.fold(log_decay)
    assert torch.equal(ring.fold(log_decay, torch.tensor([2, 0], device=DEVICE)), whole[[2, 0]])
    assert all(torch.equal(x, y) for x, y in zip(ring, before, strict=True))


def call(**changes: object) -> Callable[[], Tensor]:
    q = torch.randn(2, 3, 4, 16)
    arguments = {"q": q, "k": q, "v": q, "log_decay": None, "ring": RingState.empty(2, 4, 16, 16)}
    return lambda: linear_attention_ring_step(**(arguments | changes))


COLUMNS = RingState.empty(2, 4, 16, 16)._replace(length=torch.zeros(2, 2, dtype=torch.int32)[:, 0])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"log_decay": -torch.ones(2, 3, 4)}, NotImplementedError, "one decay per head"),
        ({"log_decay": torch.ones(4)}, ValueError, "log_decay holds 1.0"),
        ({"q": torch.ones(2, 3, 4, 16, requires_grad=True)}, NotImplementedError, "gradient"),
        ({"ring": RingState.empty(2, 4, 16, 16, capacity=4)}, ValueError, "half of the ring"),
        ({"ring": RingState.empty(3, 4, 16, 16)}, ValueError, "ring.state has shape"),
        ({"ring": RingState.empty(2, 4, 16, 16, dtype=torch.float16)}, TypeError, "ring.keys"),
        ({"ring": torch.zeros(2, 4, 16, 16)}, TypeError, "^ring is Tensor; expected a RingState"),
        ({"ring": tuple(RingState.empty(2, 4, 16, 16))}, TypeError, "^ring is tuple; expected"),
        ({"ring": COLUMNS}, ValueError, "^ring.length has stride 2 in its last dim"),
        ({"ring": COLUMNS._replace(keys=torch.zeros(2))}, ValueError, "^ring.keys has shape"),
        ({"slots": torch.tensor([0, 0], dtype=torch.int32)}, ValueError, "each at most once"),
        ({"slots": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "row of the pool"),
        ({"slots": torch.tensor([0, 1])}, TypeError, "int32"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_calls_say_what_was_expected(
    changes: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call(**changes)()


@pytest.mark.parametrize("capacity", [0, 3, 34])
def test_capacities_are_even_and_small(capacity: int) -> None:
    with pytest.raises(ValueError, match="even number from 2 to 32"):
        RingState.empty(1, 1, 16, 16, capacity=capacity)


def test_capacities_and_dtypes_of_another_kind_are_refused() -> None:
    for capacity in (4.0, True):
        with pytest.raises(TypeError, match=f"capacity is {capacity}; expected an int"):
            RingState.empty(1, 1, 16, 16, capacity=capacity)
    with pytest.raises(TypeError, match=r"^dtype is torch.int32; expected float64"):
        RingState.from_state(torch.zeros(1, 1, 16, 16), dtype=torch.int32)


def test_the_op_passes_the_checks_of_torch() -> None:
    q = torch.randn(1, 1, 16, device=DEVICE)
    ring = RingState.empty(1, 1, 16, 16, capacity=2, device=DEVICE)
    log_decay = make_log_decay("constant", 1, 1, 1, 16).to(DEVICE)
    torch.library.opcheck(decode_ops.ring_step, (q, q, q, log_decay, *ring, None, 1.0))


def test_the_ring_step_compiles_whole(form: str) -> None:
    q = torch.randn(1, 1, 16, device=DEVICE)
    state = torch.randn(1, 1, 16, 16, device=DEVICE)

    def step(q: Tensor, ring: RingState) -> Tensor:
        return linear_attention_ring_step(q, q, q, None, ring)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    rings = [RingState.from_state(state.clone(), capacity=2) for _ in range(2)]
    for _ in range(3):
        assert_close(compiled(q, rings[0]), step(q, rings[1]).double())
    assert torch.equal(rings[0].length, rings[1].length)
    assert_close(rings[0].fold(None), rings[1].fold(None).double())
