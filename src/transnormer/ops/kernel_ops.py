"""Elementwise functions and scans as torch ops whose kernels are Triton's: definition and choice.

What torch has to know (schema, shapes, gradients) needs no Triton: the module with the kernels is
imported when the op first runs.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

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
) -> None:
    """Define ``transnormer::name`` and ``transnormer::name_backward``.

    A second derivative raises NotImplementedError.

    Args:
        name: of the op.
        kernels: the module whose functions ``forward`` and ``backward`` run the two.
        forward: the op.
        backward: the op of its gradients.
        setup_context, gradients: as ``torch.library.register_autograd`` has them.
    """

    def no_second(ctx: Any, *grads: Any) -> None:
        # Without this, torch takes the second derivative for 0.
        raise NotImplementedError(
            f"the kernels of {name} have no second derivative; use implementation='torch'"
        )

    def define_one(op: str, function: str, form: Form) -> None:
        def run(*inputs: Any) -> Any:
            return getattr(import_module(kernels), function)(*inputs)

        _LIBRARY.define(op + form.schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"transnormer::{op}", form.fake, lib=_LIBRARY)

    define_one(name, "forward", forward)
    define_one(f"{name}_backward", "backward", backward)
    torch.library.register_autograd(
        f"transnormer::{name}", gradients, setup_context=setup_context, lib=_LIBRARY
    )
    torch.library.register_autograd(f"transnormer::{name}_backward", no_second, lib=_LIBRARY)
