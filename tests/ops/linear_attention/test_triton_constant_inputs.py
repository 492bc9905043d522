"""The kernels of constant decay among strides, graphs, fake tensors and refusals (interpreted)."""

import pytest
import torch
from attention_cases import Inputs, check_gradients, make_inputs
from kernel_cases import (
    FORM,
    LAYOUTS,
    OP,
    assert_same,
    force_segments,
    fused,
    gradients_of,
    laid_out,
    needs_interpreter,
    results,
)
from tolerances import OUTPUT, assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from transnormer.ops import linear_attention

pytestmark = needs_interpreter


def attend(q, k, v, log_decay, state=None, cu_seqlens=None):
    return linear_attention(
        q, k, v, log_decay, initial_state=state, cu_seqlens=cu_seqlens, implementation=FORM
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str) -> None:
    inputs = make_inputs(33, decay="none", heads=2, kv_heads=1)
    moved = inputs._replace(**{name: laid_out(getattr(inputs, name), layout) for name in "qkv"})
    assert moved.q.stride() != inputs.q.stride() or layout == "unaligned"
    assert_same(results(moved), results(inputs))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_slices_of_one_projection(reverse: bool) -> None:
    inputs = make_inputs(35, heads=2, kv_heads=1, state_rows=2)
    q, k, v = fused(*inputs[:3])
    assert q.data_ptr() + q.shape[2] * q.shape[3] * q.element_size() == k.data_ptr()
    sliced = Inputs(q, k, v, *inputs[3:])
    assert_same(results(sliced, reverse=reverse), results(inputs, reverse=reverse))


def test_slices_of_one_packed_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, 64)
    inputs = make_inputs(90, batch=1, heads=1, state_rows=3)
    sliced = Inputs(*fused(*inputs[:3]), *inputs[3:])
    bounds = torch.tensor([0, 1, 89, 90])
    assert_same(results(sliced, cu_seqlens=bounds), results(inputs, cu_seqlens=bounds))


def test_bounds_with_strides() -> None:
    inputs = make_inputs(20, batch=1, state_rows=3)
    plain = torch.tensor([0, 3, 3, 20])
    bounds = torch.stack([plain, plain.flip(0)], 1)[:, 0]
    assert bounds.stride() == (2,)
    assert_same(results(inputs, cu_seqlens=bounds), results(inputs, cu_seqlens=plain))


def test_decays_with_strides() -> None:
    inputs = make_inputs(20, batch=1)
    spread = torch.full((2, 2), float("nan"))
    spread[:, 0] = inputs.log_decay
    assert_same(results(inputs._replace(log_decay=spread[:, 0])), results(inputs))
    shared = torch.tensor([-0.3]).expand(2)
    exact = results(inputs._replace(log_decay=shared.contiguous()))
    assert_same(results(inputs._replace(log_decay=shared)), exact)


def test_expanded_heads_and_tokens() -> None:
    q, k, v, log_decay, _ = make_inputs(5)
    for wide in (k[:, :, :1].expand_as(k), k[:, :1].expand_as(k), k[:1].expand_as(k)):
        exact = results(Inputs(q, wide.contiguous(), v, log_decay, None))
        assert_same(results(Inputs(q, wide, v, log_decay, None)), exact)


def test_states_with_strides() -> None:
    inputs = make_inputs(17, state_rows=2)
    exact = inputs.initial_state[:1].expand(2, -1, -1, -1)
    for state in (exact, exact.mT.contiguous().mT):
        moved = inputs._replace(initial_state=state)
        assert_same(results(moved), results(inputs._replace(initial_state=exact.contiguous())))


@pytest.mark.parametrize("layout", ["heads_first", "surrounded", "reversed_dims", "expanded"])
def test_gradients_of_outputs_with_strides(layout: str) -> None:
    inputs = make_inputs(17, state_rows=2)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = attend(*leaves)
    o_grad, state_grad = gradients_of(outputs)
    if layout == "expanded":
        o_grad = o_grad[:, :1, :, :1]
        moved = o_grad.expand(outputs[0].shape)
    else:
        moved = laid_out(o_grad, layout)
    transposed = state_grad.mT.contiguous().mT
    plain = moved.contiguous()
    exact = torch.autograd.grad(outputs, leaves, (plain, state_grad), retain_graph=True)
    assert_same(torch.autograd.grad(outputs, leaves, (moved, transposed)), exact)


@pytest.mark.parametrize("names", ["q", "k v", "log_decay", "initial_state"])
def test_any_one_gradient_alone(names: str) -> None:
    inputs = make_inputs(17, batch=1, state_rows=1)
    exact = dict(zip(Inputs._fields, results(inputs)[2:]))
    wanted = [n in names.split() for n in Inputs._fields]
    leaves = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted)]
    outputs = attend(*leaves)
    torch.autograd.backward(outputs, gradients_of(outputs))
    for name, x in zip(Inputs._fields, leaves):
        assert (x.grad is None) == (name not in names.split())
        if x.grad is not None:
            assert_close(x.grad, exact[name], name=name)


@pytest.mark.parametrize("used", [0, 1], ids=["only_o", "only_the_final_state"])
def test_one_output_alone(used: int) -> None:
    inputs = make_inputs(35, batch=1, state_rows=1)
    grads = []
    for form, part in (("reference", inputs.double()), (FORM, inputs)):
        leaves = part.leaves()
        outputs = linear_attention(
            *leaves[:4], initial_state=leaves.initial_state, implementation=form
        )
        outputs[used].square().sum().backward()
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for name, actual, exact in zip(Inputs._fields, grads[1], grads[0]):
        assert_close(actual, exact, limit=1e-5, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_log_decay_may_have_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    inputs = make_inputs(17, batch=1, state_rows=1)
    log_decay = inputs.log_decay.to(dtype)
    exact = results(inputs._replace(log_decay=log_decay.float()))
    actual = results(inputs._replace(log_decay=log_decay))
    assert actual[5].dtype == dtype
    assert_same([*actual[:5], actual[6]], [*exact[:5], exact[6]])
    assert torch.equal(actual[5], exact[5].to(dtype))


def test_reverse_is_what_is_true() -> None:
    inputs = make_inputs(20, batch=1, heads=1)
    assert_same(results(inputs, reverse=2), results(inputs, reverse=True))
    assert_same(results(inputs, reverse=0), results(inputs, reverse=False))


def test_runs_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, 64)
    inputs = make_inputs(130, batch=1, heads=2, kv_heads=1, state_rows=1)
    assert_same(results(inputs), results(inputs))


def test_rows_of_a_batch_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    force_segments(monkeypatch, 64)
    inputs = make_inputs(70, heads=1, state_rows=2)
    leaves = inputs.leaves()
    whole = attend(*leaves)
    grads = gradients_of(whole)
    torch.autograd.backward(whole, grads)
    for i in range(2):
        row = slice(i, i + 1)
        part = Inputs(*(x[row] for x in inputs[:3]), inputs.log_decay, inputs.initial_state[row])
        part = part.leaves()
        alone = attend(*part)
        torch.autograd.backward(alone, [x[row] for x in grads])
        assert_same([x.detach() for x in alone], [x.detach()[row] for x in whole])
        for name in ("q", "k", "v", "initial_state"):
            assert torch.equal(getattr(part, name).grad, getattr(leaves, name).grad[row])


def test_heads_do_not_meet() -> None:
    inputs = make_inputs(17, batch=1, heads=5, state_rows=1)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = [x[:, :, order] for x in inputs[:3]]
    permuted = Inputs(*moved, inputs.log_decay[order], inputs.initial_state[:, order])
    leaves, outputs = [], []
    for part in (inputs, permuted):
        leaves.append([x.detach().requires_grad_() for x in part])
        outputs.append(attend(*leaves[-1]))
    assert torch.equal(outputs[0][0][:, :, order], outputs[1][0])
    assert torch.equal(outputs[0][1][:, order], outputs[1][1])
    grads = [torch.autograd.grad([o.sum(), s.sum()], x) for x, (o, s) in zip(leaves, outputs)]
    for i in range(3):
        assert torch.equal(grads[0][i][:, :, order], grads[1][i])
    assert torch.equal(grads[0][3][order], grads[1][3])
    assert torch.equal(grads[0][4][:, order], grads[1][4])


def test_no_grad_keeps_no_graph() -> None:
    with torch.no_grad():
        outputs = attend(*make_inputs(20, state_rows=2).leaves())
    assert not any(x.requires_grad for x in outputs)


def test_inputs_are_left_as_they_were() -> None:
    inputs = make_inputs(35, heads=1, state_rows=2)
    before = [x.clone() for x in inputs]
    results(inputs)
    assert_same(list(inputs[:3]), before[:3])
    assert torch.equal(inputs.initial_state, before[4])


def test_activation_checkpointing_changes_nothing() -> None:
    inputs = make_inputs(35, heads=1, state_rows=2)
    grads = []
    for call in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        leaves = inputs.leaves()
        o, state = call(*leaves)
        (o.square().sum() + state.sum()).backward()
        grads.append([x.grad for x in leaves])
    assert_same(grads[0], grads[1])


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    inputs = make_inputs(35, heads=1, state_rows=2)
    exact = attend(*(x.half() for x in inputs[:3]), *inputs[3:])
    leaves = inputs.leaves()
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = attend(*leaves)
    assert outputs[0].dtype == torch.float16
    assert_same([x.detach() for x in outputs], list(exact))
    (outputs[0].float().sum() + outputs[1].sum()).backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_library_op_passes_opcheck(packed: bool) -> None:
    bounds = torch.tensor([0, 1, 1, 5]) if packed else None
    inputs = make_inputs(5, batch=1, heads=1, state_rows=3 if packed else 1).leaves()
    log_decay = torch.tensor([-0.5], requires_grad=True)
    op = getattr(torch.ops.transnormer, OP).default
    q, k, v, _, state = inputs
    torch.library.opcheck(op, (q, k, v, log_decay, state, bounds, 1.0, False))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_fullgraph_compile_with_changing_lengths(packed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seq in (5, 20, 9):
        bounds = torch.tensor([0, 1, 1, seq]) if packed else None
        inputs = make_inputs(seq, batch=1, heads=1, state_rows=3 if packed else 1)
        grads = []
        for call in (compiled, attend):
            leaves = inputs.leaves()
            outputs = call(*leaves, bounds)
            (outputs[0].square().sum() + outputs[1].sum()).backward()
            grads.append([*(x.detach() for x in outputs), *(x.grad for x in leaves)])
        for x, y in zip(*grads):
            assert_close(x, y, limit=OUTPUT[torch.float32])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_one_graph_serves_every_length(packed: bool) -> None:
    # Shapes alone: from one segment a sequence to as many as a GPU has room for.
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    log_decay = torch.empty(8, device="meta")
    bounds = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
    for seq in (300, 400, 600, 1100, 2100, 4200, 8300, 17_000, 33_000, 1_000_000):
        x = torch.empty(1, seq, 8, 16, device="meta")
        compiled(x, x, x, log_decay, None, bounds)
    # The first length gets a graph of its own, the second one with a symbolic length.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_give_shapes_dtypes_and_strides(kind: str, packed: bool) -> None:
    inputs = make_inputs(70, batch=1, heads=4, kv_heads=2, state_rows=3 if packed else 1)
    inputs = inputs._replace(q=inputs.q.half(), k=inputs.k.half(), v=inputs.v.half())
    arguments = [*inputs, torch.tensor([0, 1, 1, 70]) if packed else None]
    real = attend(*arguments)
    if kind == "meta":
        shadow = attend(*(None if x is None else x.to("meta") for x in arguments))
    else:
        with FakeTensorMode() as mode:
            shadow = attend(*(None if x is None else mode.from_tensor(x) for x in arguments))
    for x, y in zip(shadow, real, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_symbolic_lengths_trace_forward_and_backward() -> None:
    inputs = make_inputs(35, batch=1, heads=1).leaves()

    def call(q, k, v, log_decay):
        o, state = attend(q, k, v, log_decay)
        return torch.autograd.grad(o.sum() + state.sum(), (q, k, v, log_decay))

    trace = make_fx(call, tracing_mode="symbolic")
    graph = trace(*inputs[:4])
    longer = make_inputs(70, batch=1, heads=1).leaves()
    for x, y in zip(graph(*longer[:4]), call(*longer[:4])):
        assert torch.equal(x, y)


def test_float64_is_refused() -> None:
    inputs = make_inputs(20, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        attend(*inputs)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(260, 32), (32, 516)])
def test_sizes_beyond_the_contract_are_refused_by_name(key_dim: int, value_dim: int) -> None:
    inputs = make_inputs(20, key_dim=key_dim, value_dim=value_dim)
    with pytest.raises(NotImplementedError, match=str(max(key_dim, value_dim))):
        attend(*inputs)
    check_gradients(inputs, "auto")


def test_auto_does_not_interpret_kernels_on_the_cpu() -> None:
    inputs = make_inputs(200, state_rows=2)
    assert_same(results(inputs, "auto"), results(inputs, "chunked"))
    with torch.profiler.profile() as profile:
        results(inputs, "auto")
    assert not any(OP in event.name for event in profile.events())
