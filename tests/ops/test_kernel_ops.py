"""The two ways into an op whose kernels are Triton's: torch's dispatcher, and past it."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from transnormer.ops import kernel_ops
from transnormer.ops.kernel_ops import Form

KERNELS = "kernels_of_scaled"


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, shift, ctx.factor = inputs
    ctx.save_for_backward(x, shift)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    assert len(ctx.needs_input_grad) >= 3
    d_shift = grad if ctx.needs_input_grad[1] else None
    return SCALED_BACKWARD(grad, ctx.saved_tensors[0], ctx.factor), d_shift, None


SCALED, SCALED_BACKWARD = kernel_ops.define(
    "test_scaled",
    KERNELS,
    Form("(Tensor x, Tensor? shift, float factor) -> Tensor", lambda x, *_: torch.empty_like(x)),
    Form(
        "(Tensor grad, Tensor x, float factor) -> Tensor", lambda grad, *_: torch.empty_like(grad)
    ),
    _setup_context,
    _gradients,
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for real tensors alone, as Triton's are: they take numbers out of memory."""

    def forward(x: Tensor, shift: Tensor | None, factor: float) -> Tensor:
        y = torch.from_numpy(x.detach().numpy() * factor)
        return y if shift is None else y + shift.detach()

    def backward(grad: Tensor, x: Tensor, factor: float) -> Tensor:
        return torch.from_numpy(grad.detach().numpy() * factor)

    module = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, KERNELS, module)


class Seen(TorchDispatchMode):
    """Notes the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "transnormer":
            self.ops.append(func._opname)
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A class of tensors of somebody else's."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Named.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Counted:
    """Counts the calls of the op itself, through the dispatcher."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> "Counted":
        function = SCALED.__closure__[[*SCALED.__code__.co_freevars].index("op")]
        self._op = function.cell_contents

        def op(*inputs: Any) -> Any:
            self.calls += 1
            return self._op(*inputs)

        self._cell = function
        function.cell_contents = op
        return self

    def __exit__(self, *_: object) -> None:
        self._cell.cell_contents = self._op


def assert_equal(x: Tensor | None, values: list[float]) -> None:
    assert x is not None
    assert x.tolist() == values


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
def test_both_ways_give_the_same(watched: bool, kind: type) -> None:
    x = torch.randn(3)
    x = nn.Parameter(x) if kind is nn.Parameter else x.requires_grad_()
    shift = torch.randn(3, requires_grad=True)
    with Seen() if watched else torch.enable_grad():
        y = SCALED(x, shift, 2.0)
        y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(y, 2 * x + shift)
    assert_equal(x.grad, [2.0, 4.0, 6.0])
    assert_equal(shift.grad, [1.0, 2.0, 3.0])
    with torch.no_grad():
        assert not SCALED(x, None, 2.0).requires_grad
    assert not SCALED(x.detach(), None, 2.0).requires_grad


@pytest.mark.parametrize("watched", [False, True])
def test_a_second_derivative_is_refused(watched: bool) -> None:
    x = torch.randn(3, requires_grad=True)
    with Seen() if watched else torch.enable_grad():
        (first,) = torch.autograd.grad(SCALED(x, None, 2.0).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="use implementation='torch'"):
            first.sum().backward()


def test_modes_see_the_op_and_its_gradient() -> None:
    with Seen() as seen:
        SCALED(torch.randn(3, requires_grad=True), None, 2.0).sum().backward()
    assert seen.ops == ["test_scaled", "test_scaled_backward"]


def test_functions_of_torch_are_seen_by_modes_and_classes() -> None:
    found: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    with Functions():
        SCALED(torch.ones(3), None, 2.0)
    assert any("test_scaled" in name for name in found)
    Named.seen.clear()
    SCALED(torch.ones(3).as_subclass(Named), None, 2.0)
    assert any("test_scaled" in name for name in Named.seen)


@pytest.mark.parametrize("threads", [False, True])
def test_profilers_see_the_op(threads: bool) -> None:
    from torch._C._profiler import _ExperimentalConfig

    config = _ExperimentalConfig(profile_all_threads=threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
        SCALED(torch.ones(3), None, 2.0)
    assert "transnormer::test_scaled" in {event.key for event in profile.key_averages()}


def test_tracers_and_compilers_see_the_op() -> None:
    def function(x: Tensor) -> Tensor:
        return SCALED(x, None, 2.0)

    x = torch.ones(3)
    for graph in (make_fx(function)(x), make_fx(function, tracing_mode="symbolic")(x)):
        assert "transnormer.test_scaled" in graph.code
    with pytest.deprecated_call():
        traced: Any = torch.jit.trace(function, x, check_trace=False)
    assert "transnormer::test_scaled" in str(traced.graph)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = torch.ones(3, requires_grad=True)
    compiled(given).sum().backward()
    assert_equal(given.grad, [2.0, 2.0, 2.0])


def test_transforms_see_the_op() -> None:
    y = torch.vmap(lambda x: SCALED(x, None, 2.0))(torch.ones(2, 3))
    assert torch.equal(y, torch.full((2, 3), 2.0))


def test_gradients_come_in_batches() -> None:
    # By the first vmap, whose tensors are of torch's own class.
    x = torch.randn(3, requires_grad=True)
    (grads,) = torch.autograd.grad(SCALED(x, None, 2.0), x, torch.eye(3), is_grads_batched=True)
    assert torch.equal(grads, 2 * torch.eye(3))


# Of torch's own, where derivatives in forward mode begin.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_has_a_tangent_goes_to_the_dispatcher() -> None:
    with Counted() as counted, forward_ad.dual_level():
        SCALED(forward_ad.make_dual(torch.ones(3), torch.ones(3)), None, 2.0)
    assert counted.calls == 1
    with Counted() as counted:
        SCALED(torch.ones(3), None, 2.0)
    assert counted.calls == 0


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_of_inference_go_the_short_way(inference: bool) -> None:
    with Counted() as counted, torch.inference_mode(inference):
        SCALED(torch.ones(3), None, 2.0)
        SCALED(torch.ones(4)[1:], torch.ones(3), 2.0)
    assert counted.calls == 0


def test_a_tensor_without_values_gives_one() -> None:
    y = SCALED(torch.ones(3, device="meta", requires_grad=True), None, 2.0)
    assert y.is_meta
    assert y.requires_grad


def test_zeros_without_memory_and_wrapped_tensors_count() -> None:
    assert_equal(SCALED(torch._efficientzerotensor(3), None, 2.0), [0.0, 0.0, 0.0])
    wrapped = SCALED(torch._to_functional_tensor(torch.ones(3)), None, 2.0)
    assert_equal(torch._from_functional_tensor(wrapped), [2.0, 2.0, 2.0])


def test_a_sign_that_is_not_in_memory_yet_counts() -> None:
    x = torch.complex(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).conj().imag
    assert x.is_neg()
    assert_equal(SCALED(x, None, 2.0), [-2.0, -4.0, -6.0])


def test_the_op_passes_opcheck() -> None:
    op = torch.ops.transnormer.test_scaled.default
    for shift in (None, torch.randn(3, requires_grad=True)):
        torch.library.opcheck(op, (torch.randn(3, requires_grad=True), shift, 2.0))
