"""Keys that are a softmax over the past: weights sum to 1, in PyTorch and in the kernels."""

import math

import pytest
import torch
from kernel_cases import laid_out, needs_interpreter
from ops.gates.gate_cases import assert_same_or_close, both, weighted
from tolerances import CUMULATIVE_SOFTMAX, EPS, GATE_GRADIENT, assert_close
from torch import Tensor

from transnormer.ops.gates import cumulative_softmax

HEADS, DIM = 2, 20
# Lengths 0, 1, 19, 17, 18 and 0: units have 16 tokens.
BOUNDS = torch.tensor([0, 0, 1, 20, 37, 55, 55])


def make(
    seq: int, rows: int = 1, size: float = 3.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits of one batch row and masses of so many sequences, the first of them none."""
    log_mass = torch.randn(rows, HEADS, DIM)
    log_mass[0, 0] = -math.inf
    return (size * torch.randn(1, seq, HEADS, DIM)).to(dtype), log_mass


def results(
    logits: Tensor, log_mass: Tensor, implementation: str, **kwargs: object
) -> tuple[Tensor, ...]:
    """log_decay, keys, masses at the ends; gradients of logits and masses."""
    leaves = logits.detach().requires_grad_(), log_mass.detach().requires_grad_()
    found = cumulative_softmax(*leaves, implementation=implementation, **kwargs)
    return *(x.detach() for x in found), *torch.autograd.grad(weighted(found), leaves)


def check(logits: Tensor, log_mass: Tensor, **kwargs: object) -> None:
    """The kernels against float64."""
    exact = results(logits.double(), log_mass.double(), "torch", **kwargs)
    actual = results(logits, log_mass, "triton", **kwargs)
    dtype = logits.dtype
    limits = {
        "log_decay": CUMULATIVE_SOFTMAX,
        "keys": max(CUMULATIVE_SOFTMAX, EPS[dtype] if dtype != torch.float32 else 0.0),
        "log_mass": CUMULATIVE_SOFTMAX,
        "d logits": GATE_GRADIENT[dtype],
        "d log_mass": GATE_GRADIENT[torch.float32],
    }
    for (name, limit), x, y in zip(limits.items(), actual, exact, strict=True):
        assert_same_or_close(x, y, limit, name)


@both
def test_weights_and_initial_mass_sum_to_one(implementation: str) -> None:
    logits, log_mass = make(50)
    log_mass = torch.where(log_mass.isneginf(), 0.5, log_mass)
    log_decay, keys, end = cumulative_softmax(logits, log_mass, implementation=implementation)
    z = torch.logcumsumexp(torch.cat([log_mass[:, None], logits], 1).double(), 1)
    assert_close(end, z[:, -1], limit=CUMULATIVE_SOFTMAX)
    assert_close(log_decay, -z.diff(dim=1), limit=CUMULATIVE_SOFTMAX)
    assert_close(keys, (logits - z[:, 1:]).exp(), limit=CUMULATIVE_SOFTMAX)
    assert_close(keys + log_decay.exp(), torch.ones_like(keys).double())


def test_gradients_are_those_of_the_values() -> None:
    logits = torch.randn(1, 9, 1, 2, dtype=torch.float64, requires_grad=True)
    log_mass = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 4, 9])
    assert torch.autograd.gradcheck(
        lambda x, y: cumulative_softmax(x, y, cu_seqlens=bounds), (logits, log_mass)
    )


@needs_interpreter
@pytest.mark.parametrize("seq", [1, 16, 17, 50])
def test_every_length(seq: int) -> None:
    check(*make(seq))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check(*make(20, dtype=dtype))


@needs_interpreter
@pytest.mark.parametrize(
    ("masked", "size"), [(False, 300.0), (True, 3.0)], ids=["all-300", "masked-3"]
)
def test_packed_sequences_and_masks(masked: bool, size: float) -> None:
    logits, log_mass = make(55, rows=6, size=size)
    mask = None
    if masked:
        mask = torch.rand(1, 55) < 0.7
        # The start of a sequence without a mass, and a whole one.
        mask[:, 1:5] = mask[:, 37:] = False
        log_mass[2] = -math.inf
        logits[:, 21] = -math.inf
    check(logits, log_mass, cu_seqlens=BOUNDS, mask=mask)


@needs_interpreter
def test_log_decays_of_doubled_keys() -> None:
    check(*make(20), copies=2)


@both
def test_copies_stand_side_by_side_in_each_head(implementation: str) -> None:
    logits, log_mass = make(5)
    once = cumulative_softmax(logits, log_mass, implementation=implementation)[0]
    twice = cumulative_softmax(logits, log_mass, copies=2, implementation=implementation)[0]
    assert torch.equal(twice, torch.cat([once, once], -1))


@needs_interpreter
def test_short_packed_sequences_take_one_launch() -> None:
    logits, log_mass = make(14, rows=3)
    check(logits, log_mass, cu_seqlens=torch.tensor([0, 6, 6, 14]))


@both
def test_masked_tokens_leave_no_trace(implementation: str) -> None:
    logits, log_mass = make(40)
    mask = torch.rand(1, 40) < 0.6
    log_decay, keys, end = cumulative_softmax(
        logits, log_mass, mask=mask, implementation=implementation
    )
    assert bool((log_decay[~mask] == 0).all() & (keys[~mask] == 0).all())
    short = cumulative_softmax(logits[mask][None], log_mass, implementation=implementation)
    assert_same_or_close(log_decay[mask][None], short[0].double(), CUMULATIVE_SOFTMAX, "log_decay")
    assert_close(keys[mask][None], short[1].double(), limit=CUMULATIVE_SOFTMAX)
    assert_same_or_close(end, short[2].double(), CUMULATIVE_SOFTMAX, "log_mass")


@both
@pytest.mark.parametrize("offset", [0.0, 3000.0, -3000.0])
def test_any_range_of_logits_is_summed(offset: float, implementation: str) -> None:
    # A log mass of 10,000 has no digits of float32 left for log 2; the kernels have it as a pair.
    dtype = torch.float64 if implementation == "torch" else torch.float32
    x = offset + torch.tensor([-1e4, 0.0, 1e4, 1e4, -1e4], dtype=dtype)
    logits = x.view(1, 5, 1, 1).requires_grad_()
    none = torch.full((1, 1, 1), -math.inf, dtype=dtype)
    log_decay, keys, end = cumulative_softmax(logits, none, implementation=implementation)
    half = -math.log(2.0)
    for actual, exact in (
        (keys, [1.0, 1.0, 1.0, 0.5, 0.0]),
        (log_decay[:, 1:], [-1e4, -1e4, half, 0.0]),
        (end, [offset + 1e4 - half]),
    ):
        assert_close(actual.flatten(), torch.tensor(exact, dtype=torch.float64))
    assert log_decay[0, 0].isneginf()
    (grad,) = torch.autograd.grad(end.sum() + log_decay[:, 3].sum(), logits)
    assert_close(grad.flatten(), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).double())


@both
def test_no_heads_have_no_gates(implementation: str) -> None:
    logits, log_mass = torch.zeros(2, 3, 0, 4), torch.zeros(2, 0, 4)
    results = cumulative_softmax(logits, log_mass, copies=2, implementation=implementation)
    assert [tuple(x.shape) for x in results] == [(2, 3, 0, 8), (2, 3, 0, 4), (2, 0, 4)]


@both
def test_sequences_without_tokens_pass_their_mass_on(implementation: str) -> None:
    logits, log_mass = make(0, rows=3)
    log_mass = log_mass.requires_grad_()
    bounds = torch.zeros(4, dtype=torch.int32)
    end = cumulative_softmax(logits, log_mass, cu_seqlens=bounds, implementation=implementation)[2]
    assert torch.equal(end, log_mass)
    (grad,) = torch.autograd.grad(end, log_mass, torch.ones_like(end))
    assert torch.equal(grad, (~log_mass.isneginf()).float())


@needs_interpreter
@pytest.mark.parametrize("layout", ["surrounded", "every_second", "reversed_dims"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_strides_change_nothing(heads: int, layout: str) -> None:
    logits, log_mass = (x[..., :heads, :] for x in make(20))
    moved = results(laid_out(logits, layout), log_mass, "triton")
    for x, y in zip(moved, results(logits, log_mass, "triton"), strict=True):
        assert torch.equal(x, y)


@needs_interpreter
def test_what_is_no_number_shows() -> None:
    logits, log_mass = make(24)
    logits[:, 10] = float("nan")
    log_decay, keys, end = cumulative_softmax(logits, log_mass, implementation="triton")
    assert bool(log_decay[:, 10:].isnan().all() & keys[:, 10:].isnan().all() & end.isnan().all())
    assert bool(keys[:, :10].isfinite().all())


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
def test_the_library_ops_pass_opcheck(packed: bool) -> None:
    x, log_mass = torch.randn(1, 18, 3), torch.randn(2 if packed else 1, 3)
    bounds = torch.tensor([0, 7, 18]) if packed else None
    op = torch.ops.transnormer.cumulative_softmax.default
    leaves = x.requires_grad_(), log_mass.requires_grad_()
    torch.library.opcheck(op, (*leaves, None, bounds, 3, 2))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"logits": torch.zeros(1, 4, 6)}, ValueError, "logits has shape"),
        ({"log_mass": torch.zeros(2, 2, 3)}, ValueError, "log_mass has shape"),
        ({"log_mass": torch.zeros(1, 2, 3).double()}, TypeError, "log_mass is torch.float64"),
        ({"mask": torch.zeros(1, 4)}, TypeError, "mask is torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens is"),
        ({"copies": 3}, ValueError, "copies is 3; expected 1 or 2"),
        ({"copies": 2.0}, ValueError, "copies is 2.0; expected 1 or 2"),
        ({"implementation": "none"}, ValueError, "implementation of cumulative_softmax"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict, error: type[Exception], named: str) -> None:
    given = {"logits": torch.zeros(1, 4, 2, 3), "log_mass": torch.zeros(1, 2, 3)} | changes
    with pytest.raises(error, match=named):
        cumulative_softmax(given.pop("logits"), given.pop("log_mass"), **given)
