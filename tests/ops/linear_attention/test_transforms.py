"""The op under torch.compile, meta and fake tensors, autocast and activation checkpointing."""

import pytest
import torch
from attention_cases import DECAYS, make_inputs
from tolerances import OUTPUT, assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from transnormer.ops import linear_attention, linear_attention_step


def gradients(inputs, call) -> list[torch.Tensor]:
    """Outputs and gradients of one call."""
    leaves = inputs.leaves()
    o, state = call(*leaves)
    (o.square().sum() + state.sum()).backward()
    return [o, state, *(x.grad for x in leaves if x is not None)]


def attend(q, k, v, log_decay, state):
    return linear_attention(q, k, v, log_decay, initial_state=state)


@pytest.mark.parametrize("decay", DECAYS)
def test_fullgraph_compile_gives_the_eager_result(decay: str) -> None:
    inputs = make_inputs(70, decay=decay, state_rows=2)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(gradients(inputs, compiled), gradients(inputs, attend)):
        assert_close(actual, exact, limit=OUTPUT[torch.float32])


def test_compiled_graph_holds_one_op_not_a_loop() -> None:
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    for seq in (64, 1000):
        inputs = make_inputs(seq)
        torch.compile(attend, fullgraph=True, backend=count, dynamic=False)(*inputs)
        torch._dynamo.reset()
    assert sizes[0] == sizes[1]
    assert sizes[0] < 40


def test_packed_call_compiles_whole() -> None:
    q, k, v, log_decay, _ = make_inputs(70, batch=1)

    def packed(q, k, v, cu_seqlens):
        return linear_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens)

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    bounds = torch.tensor([0, 1, 1, 70])
    for actual, exact in zip(compiled(q, k, v, bounds), packed(q, k, v, bounds)):
        assert_close(actual, exact)


def test_reverse_compiles_whole() -> None:
    q, k, v, log_decay, _ = make_inputs(70, decay="token")

    def backward_in_time(q, k, v):
        return linear_attention(q, k, v, log_decay, reverse=True)

    compiled = torch.compile(backward_in_time, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(compiled(q, k, v), backward_in_time(q, k, v)):
        assert_close(actual, exact)


def test_step_compiles_whole() -> None:
    q, k, v, log_decay, state = make_inputs(1, state_rows=2)

    def step(q, k, v, state):
        return linear_attention_step(q, k, v, log_decay, state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(compiled(q, k, v, state), step(q, k, v, state)):
        assert_close(actual, exact)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_inductor_gives_the_eager_result(decay: str) -> None:
    inputs = make_inputs(70, decay=decay, state_rows=2)
    compiled = torch.compile(attend, fullgraph=True)
    for actual, exact in zip(gradients(inputs, compiled), gradients(inputs, attend)):
        assert_close(actual, exact, limit=OUTPUT[torch.float32])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_give_shapes_and_dtypes(decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(70, decay=decay, heads=4, kv_heads=2, state_rows=2, dtype=dtype)
    meta = [None if x is None else x.to("meta") for x in inputs]
    for actual, real in zip(attend(*meta), attend(*inputs)):
        assert actual.device.type == "meta"
        assert actual.shape == real.shape
        assert actual.dtype == real.dtype


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_fake_tensors_give_shapes_and_strides(packed: bool) -> None:
    inputs = make_inputs(70, decay="key", batch=1, state_rows=3 if packed else 1)
    bounds = torch.tensor([0, 1, 1, 70]) if packed else None

    def call(q, k, v, log_decay, state, bounds):
        return linear_attention(q, k, v, log_decay, initial_state=state, cu_seqlens=bounds)

    real = call(*inputs, bounds)
    with FakeTensorMode() as mode:
        arguments = [None if x is None else mode.from_tensor(x) for x in (*inputs, bounds)]
        fake = call(*arguments)
    for x, y in zip(fake, real):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()


@pytest.mark.parametrize("decay", DECAYS)
def test_the_library_op_passes_opcheck(decay: str) -> None:
    q, k, v, log_decay, state = make_inputs(20, decay=decay, batch=1, state_rows=1).leaves()
    if log_decay is not None:
        log_decay = (-0.1 - torch.rand_like(log_decay)).detach().requires_grad_()
    op = torch.ops.transnormer.chunked_linear_attention.default
    torch.library.opcheck(op, (q, k, v, log_decay, state, None, 1.0))


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    inputs = make_inputs(70, state_rows=2)
    half = inputs._replace(q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    exact_o, exact_state = attend(*half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = attend(*inputs)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(o, exact_o)
    assert torch.equal(state, exact_state)


def test_autocast_joins_mixed_dtypes() -> None:
    inputs = make_inputs(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = linear_attention(inputs.q, inputs.k.bfloat16(), inputs.v, inputs.log_decay)
    assert o.dtype == torch.bfloat16


def test_autocast_gradients_return_in_the_inputs_dtype() -> None:
    leaves = make_inputs(20, state_rows=2).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = attend(*leaves)
    (o.float().sum() + state.sum()).backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.parametrize("decay", DECAYS)
def test_activation_checkpointing_changes_nothing(decay: str) -> None:
    inputs = make_inputs(70, decay=decay, state_rows=2)

    def recomputed(*arguments):
        return checkpoint(attend, *arguments, use_reentrant=False)

    for actual, exact in zip(gradients(inputs, recomputed), gradients(inputs, attend)):
        assert torch.equal(actual, exact)


def test_no_grad_keeps_no_graph() -> None:
    leaves = make_inputs(20, state_rows=2).leaves()
    with torch.no_grad():
        o, state = attend(*leaves)
    assert not o.requires_grad
    assert not state.requires_grad


def test_inference_mode_runs() -> None:
    with torch.inference_mode():
        o, _ = attend(*make_inputs(20, state_rows=2))
    assert bool(torch.isfinite(o).all())


def test_autocast_does_not_round_inside_a_step() -> None:
    q, k, v, log_decay, state = make_inputs(1, state_rows=2, dtype=torch.bfloat16)
    exact_o, exact_state = linear_attention_step(q, k, v, log_decay, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, after = linear_attention_step(q.float(), k.float(), v.float(), log_decay, state)
    assert torch.equal(o, exact_o)
    assert torch.equal(after, exact_state)
