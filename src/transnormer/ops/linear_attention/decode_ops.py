"""The decode kernels as torch.library ops: visible to torch.compile, tracing and CUDA graphs.

Low-level definitions, not ``torch.library.custom_op``: a step is launched once a layer and token,
and their Python wrapper costs more than the kernel. Nothing here needs Triton before a kernel runs.
The ops have no gradient; the callers in ``step`` and ``ring`` decide when they may run.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from transnormer.ops import kernel_devices

MAX_KEY_DIM = 256

_library = torch.library.Library("transnormer", "FRAGMENT")
_library.define(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor state, "
    "float scale) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "linear_attention_step_(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, "
    "Tensor? slots, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "linear_attention_ring_step_(Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor(a!) state, Tensor(b!) keys, Tensor(c!) values, Tensor(d!) start, Tensor(e!) length, "
    "Tensor? slots, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is done with these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def runs_kernel(q: Tensor, v: Tensor, *others: Tensor | None) -> bool:
    """Whether a decode kernel runs, else PyTorch operations: the one rule of all steps.

    Triton is installed; CUDA, and a device that kernels can run on (``kernel_devices``); not
    float64; a state tile fits the registers (key_dim up to 256); no input needs a gradient.
    """
    return (
        q.is_cuda
        and q.dtype != torch.float64
        and 0 < q.shape[-1] <= MAX_KEY_DIM
        and v.shape[-1] > 0
        and not needs_gradient(q, v, *others)
        and kernel_devices.why_not(q.device) is None
    )


# Triton is imported when a kernel first runs.
@functools.cache
def _step_kernels() -> ModuleType:
    from transnormer.ops.linear_attention import triton_step

    return triton_step


@functools.cache
def _ring_kernels() -> ModuleType:
    from transnormer.ops.linear_attention import triton_ring

    return triton_ring


def _count_write(x: Tensor) -> None:
    """Tell autograd that x was written, so that a graph which saved it refuses to go on."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    new_state = torch.empty_like(state)
    return _step_kernels().step(q, k, v, log_decay, state, new_state, None, scale), new_state


def _step_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    o = _step_kernels().step(q, k, v, log_decay, state, state, slots, scale)
    _count_write(state)
    return o


def _ring_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    ring = (state, keys, values, start, length)
    o = _ring_kernels().ring_step(q, k, v, log_decay, ring, slots, scale)
    for x in ring:
        _count_write(x)
    return o


def _like_outputs(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


for _device in ("CUDA", "CPU"):  # on a CPU only Triton's interpreter runs kernels
    _library.impl("linear_attention_step", _step, _device)
    _library.impl("linear_attention_step_", _step_inplace, _device)
    _library.impl("linear_attention_ring_step_", _ring_step, _device)


@torch.library.register_fake("transnormer::linear_attention_step", lib=_library)
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _like_outputs(q, v), torch.empty_like(state)


@torch.library.register_fake("transnormer::linear_attention_step_", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    return _like_outputs(q, v)


@torch.library.register_fake("transnormer::linear_attention_ring_step_", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    return _like_outputs(q, v)


step = torch.ops.transnormer.linear_attention_step.default
step_inplace = torch.ops.transnormer.linear_attention_step_.default
ring_step = torch.ops.transnormer.linear_attention_ring_step_.default
