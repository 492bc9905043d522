"""Functions as torch ops whose kernels are Triton's: definition and choice.

What torch has to know (schema, shapes, gradients) needs no Triton: the module with the kernels is
imported when the op first runs.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

from transnormer.ops.kernel_devices import why_not_named

_LIBRARY = torch.library.Library("transnormer", "FRAGMENT")


class Request(NamedTuple):
    """The facts of a call that decide which implementations can run it."""

    device: torch.device
    dtype: torch.dtype
    named: bool


def needs_triton(request: Request) -> Exception | None:
    """Why the kernels cannot run a call; None where they can."""
    reason = why_not_named(request.device, request.named)
    if reason is not None:
        return RuntimeError(f"implementation 'triton': {reason}, or use 'auto' or 'torch'")
    if request.dtype == torch.float64:
        return NotImplementedError(
            "implementation 'triton': the input is torch.float64; expected float32, bfloat16 or "
            "float16; use 'auto' or 'torch'"
        )
    return None


class Form(NamedTuple):
    """What torch has to know of one of the two ops.

    Attributes:
        schema: of the op, without its name: ``(inputs) -> outputs``.
        fake: takes the inputs and returns empty outputs.
    """

    schema: str
    fake: Callable[..., Any]


def define(
    name: str,
    kernels: str,
    forward: Form,
    backward: Form,
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    *,
    tags: Sequence[torch.Tag] = (torch.Tag.pt2_compliant_tag,),
    differentiable: str = "torch",
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Define ``transnormer::name`` and ``transnormer::name_backward``; return their callers.

    They take the ops' inputs, all of them and in order, and go past torch's dispatcher where nobody
    watches it.

    A second derivative raises NotImplementedError.

    Args:
        name: of the op.
        kernels: the module whose functions ``forward`` and ``backward`` run the two.
        forward: the op.
        backward: the op of its gradients.
        setup_context, gradients: as ``torch.library.register_autograd`` has them.
        tags: of both ops.
        differentiable: the implementation with a second derivative, which the error names.
    """

    def no_second(ctx: Any, *grads: Any) -> None:
        # Without this, torch takes the second derivative for 0.
        raise NotImplementedError(
            f"the kernels of {name} have no second derivative; use "
            f"implementation={differentiable!r}"
        )

    def define_one(
        op: str,
        function: str,
        form: Form,
        setup_context: Callable[..., None],
        gradients: Callable[..., Any],
    ) -> Callable[..., Any]:
        @cache
        def kernel() -> Callable[..., Any]:
            return getattr(import_module(kernels), function)

        def run(*inputs: Any) -> Any:
            return kernel()(*inputs)

        # By schema instead of by torch.library.custom_op, whose checks cost 10 us a call.
        _LIBRARY.define(op + form.schema, tags=tuple(tags))
        _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"transnormer::{op}", form.fake, lib=_LIBRARY)
        overload = getattr(torch.ops.transnormer, op).default
        graded = _with_gradients(overload, setup_context, gradients)
        _LIBRARY.impl(op, graded, "Autograd", with_keyset=True)
        return _short_way(overload, run, setup_context, gradients)

    return (
        define_one(name, "forward", forward, setup_context, gradients),
        define_one(f"{name}_backward", "backward", backward, lambda *_, **__: None, no_second),
    )


def _function(
    name: str,
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
) -> Any:
    """An autograd function of the inputs and, last, so that ctx counts the inputs, one thing more.

    ``run`` takes that thing and the inputs.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        *given, last = inputs
        output = run(last, *given)
        setup_context(ctx, inputs=given, output=output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        return *gradients(ctx, *grads), None

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), parts)


def _with_gradients(
    op: torch._ops.OpOverload, setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """The op's kernel for the key Autograd, as ``torch.library.register_autograd`` would make it.

    That one looks at the schema at every call, since it is for any op; this one is for ops without
    defaults, keyword arguments and lists of tensors. docs/kernels.md has what a call costs the host.
    """

    def below(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    function = _function(op._opname, below, setup_context, gradients)

    def run(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keyset)
        return below(keyset, *inputs)

    return run


@cache
def _are_plain_keys(keys: int, device: torch.device) -> bool:
    """Whether dispatch keys are those of a tensor that lies in the device's memory as it is."""
    if device.type == "meta":
        return False
    plain = [torch.empty(0, device=device)]
    with torch.inference_mode():
        plain.append(torch.empty(0, device=device))
    return keys in [torch._C._dispatch_keys(x).raw_repr() for x in plain]


def _are_plain(inputs: Sequence[Any]) -> bool:
    """Whether a kernel takes the inputs as they are: the dispatcher does more with all others.

    Of torch's own class are also tensors without memory (meta, zeros that are none), views of complex
    numbers with another sign, batches of the first vmap, and what C++ wraps.
    """
    for x in inputs:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            if not _are_plain_keys(torch._C._dispatch_keys(x).raw_repr(), x.device):
                return False
        elif isinstance(x, Tensor):
            return False
    return True


def _short_way(
    op: torch._ops.OpOverload,
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Call the op, but past torch's dispatcher where nobody watches it.

    The dispatcher brings a call into Python twice, which costs the host more than the function itself.
    Compilers, tracers, modes, torch.profiler, transforms, derivatives in forward mode and tensors of
    other classes see the op. An ExecutionTraceObserver alone, which nobody can ask for, does not.
    Inputs are not converted to the schema's types.
    """
    function = _function(op._opname, lambda _, *inputs: run(*inputs), setup_context, gradients)

    def call(*inputs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
            or profiler._is_profiler_enabled
            or forward_ad._current_level >= 0
            or not _are_plain(inputs)
        ):
            return op(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, None)
        return run(*inputs)

    return call
