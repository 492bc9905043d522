"""What tests of Triton kernels share: the way to reach them, to split them up, to lay out inputs."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from attention_cases import Inputs
from tolerances import GRADIENT, OUTPUT, assert_close
from torch import Tensor

from transnormer.ops import linear_attention

FORM = "triton"
# The library ops behind it, forward and backward.
OP = "constant_decay_attention"

# Tests that run kernels on CPU tensors: only Triton's interpreter does, and it is chosen before
# Triton is imported, which the suite does where there is no GPU.
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="kernels run on CPU tensors in Triton's interpreter only",
)

# One segment holds every sequence of the tests.
ONE_SEGMENT = 1 << 30
# Lengths 0, 1, 70, 0, 0, 64, 1, 33, 0: empty at both ends and twice in a row.
BOUNDS = [0, 0, 1, 71, 71, 71, 135, 136, 169, 169]
# How the values of a tensor may lie in memory, see ``laid_out``.
LAYOUTS = ("heads_first", "surrounded", "unaligned", "reversed_dims", "every_second")


def force_segments(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Cut every sequence into segments of so many tokens, whatever the shapes would choose."""
    if FORM != "triton":
        return
    from transnormer.ops.linear_attention import constant_decay, triton_form

    def plan(
        batch: int, seq: int, heads: int, device: torch.device, sequences: int | None = None
    ) -> constant_decay.Plan:
        if sequences is not None:
            return constant_decay.Plan(sequences + seq // tokens, tokens, 0, True)
        segments = -(-seq // tokens)
        return constant_decay.Plan(batch * segments, tokens, segments, segments > 1, 4)

    monkeypatch.setattr(constant_decay, "plan", plan)
    # None that is remembered was cut like this, and none that is made now may be.
    monkeypatch.setattr(triton_form, "_remembered", triton_form.Form)


def force_segment_count(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Ask for so many segments a sequence, more than its tokens may fill."""
    if FORM != "triton":
        return
    from transnormer.ops.linear_attention import launch_config, triton_form

    monkeypatch.setattr(launch_config, "segments_of", lambda *_: segments)
    monkeypatch.setattr(triton_form, "_remembered", triton_form.Form)


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same [batch, seq, heads, dim] values with other strides, surrounded by NaN.

    - heads_first: a view of [batch, heads, seq, dim].
    - surrounded: a block of a larger tensor, so that every edge has a neighbour.
    - unaligned: one element behind an address that vector loads could use.
    - every_second: every second token and head of a larger tensor.
    - reversed_dims: the last dim is not contiguous.
    """
    batch, seq, heads, dim = x.shape
    nan = float("nan")
    if how == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "reversed_dims":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if how == "unaligned":
        flat = x.new_full((x.numel() + 2,), nan)
        view = flat[1:-1].view(x.shape)
    elif how == "surrounded":
        view = x.new_full((batch + 1, seq + 70, heads + 2, dim + 8), nan)
        view = view[:batch, 3 : seq + 3, 1 : heads + 1, 4 : dim + 4]
    else:
        assert how == "every_second"
        view = x.new_full((batch, 2 * seq, 2 * heads, dim), nan)[:, 1::2, ::2]
    return view.copy_(x)


def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as slices of one projection [batch, seq, q | k | v | NaN], as a layer makes them."""
    parts = [x.flatten(2) for x in (q, k, v)]
    projection = torch.cat([*parts, torch.full_like(parts[0], float("nan"))], -1)
    slices = projection.split([x.shape[-1] for x in (*parts, parts[0])], -1)
    views = [y.unflatten(-1, x.shape[2:]) for x, y in zip((q, k, v), slices)]
    return views[0], views[1], views[2]


def gradients_of(outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients for outputs and final state, the same values in every dtype above bfloat16."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    draws = (torch.randn(x.shape, generator=generator, device=x.device) for x in outputs)
    return [draw.half().to(x.dtype) for draw, x in zip(draws, outputs)]


def results(inputs: Inputs, implementation: str = FORM, **kwargs: object) -> list[Tensor]:
    """Outputs, final state and the gradients of all inputs; the strides of the inputs are kept."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = linear_attention(
        *leaves[:4], initial_state=leaves[4], implementation=implementation, **kwargs
    )
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(outputs, wanted, gradients_of(outputs))
    return [*(x.detach() for x in outputs), *grads]


def check_all(inputs: Inputs, **kwargs: object) -> None:
    """Results and gradients of a call with gates against the recurrence, at the dtype's limits."""
    dtype = inputs.q.dtype
    exact = results(inputs.double(), "reference", **kwargs)
    names = [n for n, x in zip(Inputs._fields, inputs) if x is not None]
    for name, x, y in zip(("o", "final_state", *names), results(inputs, **kwargs), exact):
        limit = OUTPUT[dtype] if name in ("o", "final_state") else GRADIENT[dtype]
        assert_close(x, y, limit=limit, name=name)
        assert x.dtype == (dtype if name in ("o", "q", "k", "v") else torch.float32)
        if name == "log_decay":
            assert bool((x[inputs.log_decay.isneginf()] == 0).all())


def assert_same(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Fail unless the results of two calls are equal bit for bit, and finite."""
    for i, (x, y) in enumerate(zip(actual, exact, strict=True)):
        assert bool(torch.isfinite(x).all()), f"result {i} has NaN or infinite entries"
        assert torch.equal(x, y), f"result {i} differs"


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Fail where the host waits for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
