"""AdamW in one launch: torch's AdamW behind a clipped gradient, its state, what it refuses."""

import copy

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import ADAMW, assert_close
from torch import Tensor

from transnormer.ops.adamw import triton_adamw
from transnormer.optim.one_launch_adamw import OneLaunchAdamW

RATES = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
# Several blocks and a rest, a rest alone, one number, none.
SHAPES = ((3, 23), (5,), (), (0, 4))


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


def groups(held: list[Tensor]) -> list[dict[str, object]]:
    return [
        {"params": held[:1], "weight_decay": 0.5, "lr": 2e-2},
        {"params": held[1:], "weight_decay": 0.0},
    ]


def run(optimizer: torch.optim.Optimizer, held: list[Tensor], factor: float | None) -> None:
    """Four steps; in the second one parameter has no gradient."""
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        for number, x in enumerate(held):
            grad = torch.randn(x.shape, generator=generator).to(x.dtype)
            x.grad = None if (step, number) == (1, 1) else grad
        if isinstance(optimizer, OneLaunchAdamW):
            optimizer.step(factor=None if factor is None else torch.tensor(factor))
            continue
        for x in held:
            if factor is not None and x.grad is not None:
                x.grad *= factor
        optimizer.step()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_adamw, "BLOCK", 16)


@needs_interpreter
@pytest.mark.parametrize("factor", [None, 0.25])
def test_steps_are_those_of_torch(factor: float | None) -> None:
    exact, found = parameters(torch.float64), parameters()
    theirs = torch.optim.AdamW(groups(exact), **RATES)
    ours = OneLaunchAdamW(groups(found), **RATES, weight_decay=0.0)
    run(theirs, exact, factor)
    run(ours, found, factor)
    for x, y in zip(found, exact, strict=True):
        if not x.numel():
            continue
        assert_close(x.detach(), y.detach(), limit=ADAMW)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert_close(ours.state[x][name], theirs.state[y][name], limit=ADAMW, name=name)


@needs_interpreter
def test_gradients_stay_as_they_are() -> None:
    x = torch.ones(20, requires_grad=True)
    x.grad = torch.full((20,), 3.0)
    OneLaunchAdamW([x], **RATES, weight_decay=0.0).step(factor=torch.tensor(0.5))
    assert x.grad.tolist() == [3.0] * 20


@needs_interpreter
def test_state_that_is_put_there_counts() -> None:
    held, twin = parameters(), parameters()
    ours, other = (OneLaunchAdamW(groups(x), **RATES, weight_decay=0.0) for x in (held, twin))
    run(ours, held, None)
    run(ours, held, None)
    # It has counted steps of its own.
    run(other, twin, None)
    with torch.no_grad():
        for x, y in zip(held, twin, strict=True):
            y.copy_(x)
            other.state[y] = {name: value.clone() for name, value in ours.state[x].items()}
    run(ours, held, None)
    run(other, twin, None)
    for x, y in zip(held, twin, strict=True):
        assert torch.equal(x, y)


@needs_interpreter
def test_state_that_is_written_into_counts() -> None:
    held = parameters()
    ours = OneLaunchAdamW(groups(held), **RATES, weight_decay=0.0)
    run(ours, held, None)
    kept = copy.deepcopy([(x.detach(), ours.state[x]) for x in held])
    run(ours, held, None)
    found = [x.detach().clone() for x in held]
    with torch.no_grad():
        for x, (value, state) in zip(held, kept, strict=True):
            x.copy_(value)
            for name, y in state.items():
                ours.state[x][name].copy_(y)
    run(ours, held, None)
    assert all(torch.equal(x, y) for x, y in zip(held, found, strict=True))


@needs_interpreter
def test_a_copy_steps_its_own_parameters() -> None:
    held = parameters()
    ours = OneLaunchAdamW(groups(held), **RATES, weight_decay=0.0)
    run(ours, held, None)
    other, twin = copy.deepcopy((ours, held))
    before = [x.detach().clone() for x in held]
    run(other, twin, None)
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
    run(ours, held, None)
    assert all(torch.equal(x, y) for x, y in zip(held, twin, strict=True))


@needs_interpreter
def test_without_gradients_nothing_changes() -> None:
    x = torch.ones(20, requires_grad=True)
    ours = OneLaunchAdamW([x], **RATES, weight_decay=0.5)
    ours.step()
    assert x.tolist() == [1.0] * 20
    assert ours.state[x]["step"] == 0


@needs_interpreter
def test_gradients_may_lie_anywhere() -> None:
    found, exact = torch.ones(40, requires_grad=True), torch.ones(40, requires_grad=True)
    grad = torch.randn(41)[1:]
    found.grad, exact.grad = grad, grad.clone()
    OneLaunchAdamW([found], **RATES, weight_decay=0.0).step()
    OneLaunchAdamW([exact], **RATES, weight_decay=0.0).step()
    assert torch.equal(found, exact)


@needs_interpreter
def test_other_dtypes_and_shapes_are_refused() -> None:
    x = torch.ones(3, 4, dtype=torch.bfloat16).requires_grad_()
    x.grad = torch.ones_like(x)
    with pytest.raises(TypeError, match="a tensor is torch.bfloat16; expected torch.float32"):
        OneLaunchAdamW([x], **RATES, weight_decay=0.0).step()
    y = torch.ones(4, 3).mT.requires_grad_()
    y.grad = torch.ones_like(y)
    with pytest.raises(ValueError, match="contiguous; use contiguous"):
        OneLaunchAdamW([y], **RATES, weight_decay=0.0).step()
    groups_of_two = [{"params": [y], "betas": (0.5, 0.5)}]
    with pytest.raises(ValueError, match="a group has betas .0.5, 0.5. and eps 1e-06; expected"):
        OneLaunchAdamW(groups_of_two, **RATES, weight_decay=0.0)
