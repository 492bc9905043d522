"""The compatible signatures against the packages themselves, where those are installed."""

from collections.abc import Callable

import oracles
import pytest
import torch
from tolerances import (
    KERNEL_GRADIENT,
    KERNEL_OUTPUT,
    KERNEL_STATE,
    PEER_GRADIENT,
    PEER_OUTPUT,
    assert_close,
)
from torch import Tensor

from transnormer.compat.fla import chunk_simple_gla
from transnormer.compat.opennlplab import lightning_attn_func
from transnormer.ops.decay import tnl_log_decay

# The packages warn on import, and about things that are none of ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
GPU = "cuda"
BATCH, SEQ, HEADS, DIM = 2, 300, 4, 128
SLOPES = -tnl_log_decay(HEADS, 0, 24)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_tensors(dtype: torch.dtype, count: int = 4) -> list[Tensor]:
    """q, k, v, do in [batch, seq, heads, dim] on the CPU."""
    return [torch.randn(BATCH, SEQ, HEADS, DIM).to(dtype) for _ in range(count)]


def run(call: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = call(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def assert_agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    """Output and gradients of two packages, at the limits for such a pair."""
    limits = [PEER_OUTPUT[dtype]] + [PEER_GRADIENT[dtype]] * (len(ours) - 1)
    for name, x, y, limit in zip(("o", "dq", "dk", "dv", "dstate"), ours, theirs, limits):
        assert_close(x, y.double(), limit=limit, name=name)


@DTYPES
def test_opennlplab_computes_the_same(dtype: torch.dtype) -> None:
    package = pytest.importorskip("lightning_attn.ops", reason="lightning-attn is not installed")
    *inputs, do = (x.transpose(1, 2).contiguous().to(GPU) for x in make_tensors(dtype))
    s = SLOPES.view(HEADS, 1, 1).to(GPU)
    ours = run(lambda q, k, v: lightning_attn_func(q, k, v, s), inputs, do)
    theirs = run(lambda q, k, v: package.lightning_attn_func(q, k, v, s), inputs, do)
    assert_agree(ours, theirs, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_chunk_simple_gla"])
def test_fla_computes_the_same(name: str, dtype: torch.dtype) -> None:
    package = pytest.importorskip("fla.ops.simple_gla", reason="fla-core is not installed")
    *inputs, do = (x.to(GPU) for x in make_tensors(dtype))
    inputs.append(torch.randn(BATCH, HEADS, DIM, DIM, device=GPU))
    g_gamma = -SLOPES.to(GPU)

    def with_state(run_package: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda q, k, v, state: run_package(
            q, k, v, g_gamma=g_gamma, initial_state=state, output_final_state=True
        )[0]

    ours = run(with_state(chunk_simple_gla), inputs, do)
    theirs = run(with_state(getattr(package, name)), inputs, do)
    assert_agree(ours, theirs, dtype)


def test_fla_returns_the_same_final_state_of_whole_chunks() -> None:
    package = pytest.importorskip("fla.ops.simple_gla", reason="fla-core is not installed")
    q, k, v = (x[:, :256].to(GPU) for x in make_tensors(torch.bfloat16, 3))
    arguments = {"g_gamma": -SLOPES.to(GPU), "output_final_state": True}
    _, ours = chunk_simple_gla(q, k, v, **arguments)
    _, theirs = package.chunk_simple_gla(q, k, v, **arguments)
    assert_close(ours, theirs.double(), limit=PEER_OUTPUT[torch.bfloat16], name="final_state")


@DTYPES
def test_signatures_equal_float64(dtype: torch.dtype) -> None:
    *inputs, do = make_tensors(dtype)
    doubles = [x.double() for x in inputs]
    exact = run(lambda q, k, v: oracles.linear_attention(q, k, v, -SLOPES)[0], doubles, do.double())
    inputs, do, slopes = [x.to(GPU) for x in inputs], do.to(GPU), SLOPES.to(GPU)
    fla = run(lambda q, k, v: chunk_simple_gla(q, k, v, None, -slopes, 1.0)[0], inputs, do)

    def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = lightning_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), slopes)
        return o.transpose(1, 2)

    for results in (fla, run(swapped, inputs, do)):
        limits = [KERNEL_OUTPUT[dtype]] + [KERNEL_GRADIENT[dtype]] * 3
        for name, x, y, limit in zip(("o", "dq", "dk", "dv"), results, exact, limits):
            assert_close(x.cpu(), y, limit=limit, name=name)


def test_final_state_is_finite_where_the_package_has_nan() -> None:
    q, k, v = (x[:, :65] for x in make_tensors(torch.float32, 3))
    g_gamma = torch.full((HEADS,), -7.75)
    _, exact = oracles.linear_attention(q, k, v, g_gamma)
    q, k, v, g_gamma = (x.to(GPU) for x in (q, k, v, g_gamma))
    _, state = chunk_simple_gla(q, k, v, g_gamma=g_gamma, output_final_state=True)
    assert_close(state.cpu(), exact, limit=KERNEL_STATE[torch.float32], name="final_state")
