"""The decode kernel gives what the recurrence gives; on a CPU it runs in Triton's interpreter."""

import oracles
import pytest
import torch
from attention_cases import DECAYS, make_inputs
from tolerances import OUTPUT, STATE, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from transnormer.ops import kernel_devices, linear_attention_step
from transnormer.ops.linear_attention import decode_ops

triton_step = pytest.importorskip(
    "transnormer.ops.linear_attention.triton_step", exc_type=ModuleNotFoundError
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATED = ("token", "key")


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def check(inputs: tuple[Tensor, ...], scale: float = 1.0, cut: tuple[int, int] | None = None):
    """Compare the kernel's outputs and state with the oracle's, at the dtype's limits."""
    q, k, v, log_decay, state = inputs
    exact, exact_state = oracles.linear_attention(
        q, k, v, log_decay, initial_state=state, scale=scale
    )
    arguments = on_device(*inputs)
    if cut is None:
        o, final_state = decode_ops.step(*arguments, scale)
    else:
        final_state = torch.empty_like(arguments[4])
        o = triton_step.step(*arguments, final_state, None, scale, triton_step.Configuration(*cut))
    assert o.dtype == q.dtype
    assert final_state.dtype == torch.float32
    assert_close(o.cpu(), exact, limit=OUTPUT[q.dtype], name="o")
    assert_close(final_state.cpu(), exact_state, limit=STATE[q.dtype], name="state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("decay", DECAYS)
def test_kernel_matches_the_recurrence(decay: str, dtype: torch.dtype) -> None:
    shape = {"heads": 5, "kv_heads": 5, "key_dim": 16, "value_dim": 20}
    check(make_inputs(3, decay=decay, state_rows=2, dtype=dtype, **shape), scale=0.5)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("decay", ["constant", "key"])
def test_one_launch_takes_up_to_eight_tokens(decay: str, tokens: int) -> None:
    check(make_inputs(tokens, decay=decay, heads=2, kv_heads=1, state_rows=2))


@pytest.mark.parametrize("cut", [(8, 1), (32, 4), (64, 8)], ids=["8", "32", "64"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (20, 36), (96, 100), (256, 72)])
def test_dims_need_not_be_powers_of_two(key_dim: int, value_dim: int, cut: tuple[int, int]) -> None:
    shape = {"batch": 1, "heads": 1, "key_dim": key_dim, "value_dim": value_dim}
    check(make_inputs(2, decay="key", state_rows=1, **shape), cut=cut)


@pytest.mark.parametrize("decay", DECAYS)
def test_grouped_heads_share_a_state(decay: str) -> None:
    check(make_inputs(2, decay=decay, heads=6, kv_heads=2, state_rows=2))


@pytest.mark.parametrize("decay", GATED)
def test_a_token_without_a_tokens_dim(decay: str) -> None:
    inputs = make_inputs(1, decay=decay, heads=4, kv_heads=2, state_rows=2)
    q, k, v, log_decay, state = on_device(*inputs)
    o, after = decode_ops.step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], state, 1.0)
    whole, whole_state = decode_ops.step(q, k, v, log_decay, state, 1.0)
    assert torch.equal(o, whole[:, 0])
    assert torch.equal(after, whole_state)


def test_strided_inputs_are_read_in_place() -> None:
    inputs = make_inputs(3, decay="key", heads=2, key_dim=16, value_dim=16, state_rows=2)
    q, k, v, log_decay, state = on_device(*inputs)
    exact, exact_state = oracles.linear_attention(*inputs[:4], initial_state=inputs[4])
    fused = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = fused.split(16, -1)
    gates = log_decay.transpose(1, 3).contiguous().transpose(1, 3)
    turned = state.transpose(2, 3).contiguous().transpose(2, 3)
    pool = torch.zeros(2, 3, 2, 16, 16, device=DEVICE)
    pool[:, 1] = turned
    for each in (turned, pool[:, 1]):
        o, after = decode_ops.step(*views, gates, each, 1.0)
        assert_close(o.cpu(), exact)
        assert_close(after.cpu(), exact_state)
    last_dim = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert_close(decode_ops.step(*last_dim, gates, state, 1.0)[0].cpu(), exact)
    constant = torch.tensor([-0.3], device=DEVICE).expand(2)
    o, _ = decode_ops.step(q, k, v, constant, state, 1.0)
    exact, _ = oracles.linear_attention(*inputs[:3], constant.cpu(), initial_state=inputs[4])
    assert_close(o.cpu(), exact)


def test_in_place_is_the_same_bit_for_bit() -> None:
    q, k, v, log_decay, state = on_device(*make_inputs(4, state_rows=2))
    before = state.clone()
    o, after = decode_ops.step(q, k, v, log_decay, state, 0.5)
    assert torch.equal(state, before)
    again = decode_ops.step_inplace(q, k, v, log_decay, state, None, 0.5)
    assert torch.equal(again, o)
    assert torch.equal(state, after)


@pytest.mark.parametrize("decay", DECAYS)
def test_slots_name_the_rows_and_skipped_rows_are_zero(decay: str) -> None:
    inputs = make_inputs(2, decay=decay, batch=3, heads=4, kv_heads=2)
    q, k, v, log_decay, _ = on_device(*inputs)
    pool = torch.randn(5, 2, 16, 20).to(DEVICE)
    before, used, rows = pool.clone(), [4, 0], [0, 2]
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device=DEVICE)
    o = decode_ops.step_inplace(q, k, v, log_decay, pool, slots, 1.0)
    gates = log_decay[rows] if decay in GATED else log_decay
    exact, states = decode_ops.step(q[rows], k[rows], v[rows], gates, before[used], 1.0)
    assert torch.equal(o[rows], exact)
    assert torch.equal(pool[used], states)
    assert torch.equal(pool[[1, 2, 3]], before[[1, 2, 3]])
    assert bool((o[1] == 0).all())


def test_all_rows_skipped_touch_nothing() -> None:
    q, k, v, log_decay, pool = on_device(*make_inputs(2, state_rows=2))
    before = pool.clone()
    slots = torch.tensor([-1, -1], dtype=torch.int32, device=DEVICE)
    o = decode_ops.step_inplace(q, k, v, log_decay, pool, slots, 1.0)
    assert torch.equal(pool, before)
    assert bool((o == 0).all())


@pytest.mark.parametrize("slot", [2, -2])
def test_a_slot_outside_the_pool_shows(slot: int) -> None:
    q, k, v, log_decay, pool = on_device(*make_inputs(2, state_rows=2))
    before = pool.clone()
    slots = torch.tensor([slot, 0], dtype=torch.int32, device=DEVICE)
    o = decode_ops.step_inplace(q, k, v, log_decay, pool, slots, 1.0)
    assert bool(o[0].isnan().all())
    assert bool(o[1].isfinite().all())
    assert torch.equal(pool[1], before[1])


def test_slots_of_any_stride_are_read() -> None:
    q, k, v, log_decay, _ = on_device(*make_inputs(1))
    pools = [torch.ones(4, 2, 16, 20, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([3, -1, 1, -1], dtype=torch.int32, device=DEVICE)[::2]
    o, exact = (
        decode_ops.step_inplace(q, k, v, log_decay, pool, x, 1.0)
        for pool, x in zip(pools, (slots, slots.clone()), strict=True)
    )
    assert torch.equal(o, exact)
    assert torch.equal(*pools)


def test_slow_decay_does_not_drift() -> None:
    # This decay, rounded to float32, is off by 2.7e-8 the same way for every entry and token.
    q, k, v, log_decay, state = on_device(*make_inputs(8, heads=1, batch=1, state_rows=1))
    k, log_decay = torch.zeros_like(k), torch.full_like(log_decay, -1.04e-6)
    exact = state.double() * torch.exp(160 * log_decay.double())
    for _ in range(20):
        decode_ops.step_inplace(q, k, v, log_decay, state, None, 1.0)
    assert_close((state / exact).mean(), torch.ones_like(exact).mean(), limit=STATE[torch.float32])


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_ops_pass_the_checks_of_torch(inplace: bool) -> None:
    q, k, v, log_decay, state = on_device(*make_inputs(2, batch=1, heads=1, state_rows=1))
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    if inplace:
        op, arguments = decode_ops.step_inplace, (q, k, v, log_decay, state, slots, 0.5)
    else:
        op, arguments = decode_ops.step, (q, k, v, log_decay, state, 0.5)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_the_step_compiles_whole(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_ops, "runs_kernel", lambda *_: True)
    q, k, v, log_decay, state = on_device(*make_inputs(1, batch=1, heads=1, state_rows=1))

    def two_steps(state: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            o, state = linear_attention_step(q, k, v, log_decay, state, inplace=inplace)
        return o, state

    exact, exact_state = two_steps(state.clone())
    given = state.clone()
    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    o, after = compiled(given)
    assert torch.equal(o, exact)
    assert torch.equal(after, exact_state)
    assert torch.equal(given, exact_state if inplace else state)


def test_the_kernel_runs_on_cuda_without_gradients_only() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, device="cuda", dtype=torch.bfloat16)
        assert decode_ops.runs_kernel(q, q)
        assert not decode_ops.runs_kernel(q.double(), q.double())
        assert not decode_ops.runs_kernel(q.cpu(), q.cpu())
        wide = torch.empty(2, 4, 300, device="cuda")
        assert not decode_ops.runs_kernel(wide, q)
        leaf = torch.empty(2, 4, 32, device="cuda", requires_grad=True)
        assert not decode_ops.runs_kernel(q, q, leaf)
        with torch.no_grad():
            assert decode_ops.runs_kernel(q, q, leaf)
        state = torch.empty(2, 4, 32, 32, device="cuda")
        o, after = linear_attention_step(q, q, q, None, state)
        assert (o.shape, o.dtype, after.shape) == (q.shape, torch.bfloat16, state.shape)


def test_the_kernel_runs_where_the_package_says_kernels_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, device="cuda", dtype=torch.bfloat16)
        monkeypatch.setattr(kernel_devices, "why_not", lambda device: f"{device} is too old")
        assert not decode_ops.runs_kernel(q, q)


def test_a_written_state_is_refused_by_a_graph_that_needs_it() -> None:
    q, k, v, log_decay, state = on_device(*make_inputs(1, state_rows=2))
    factor = torch.ones((), device=DEVICE, requires_grad=True)
    product = (factor * state).sum()
    decode_ops.step_inplace(q, k, v, log_decay, state, None, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step.triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="expected a CUDA device"):
        decode_ops.step(*make_inputs(1, state_rows=2), 1.0)
