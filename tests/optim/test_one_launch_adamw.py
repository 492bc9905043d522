"""AdamW in one launch: torch's behind a clipped gradient, bfloat16 of it, state, refusals."""

import copy

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import ADAMW, EPS, assert_close
from torch import Tensor

from transnormer.ops.adamw import ManyTensors, triton_adamw
from transnormer.optim.one_launch_adamw import OneLaunchAdamW
from transnormer.optim.rounded_adamw import RoundedAdamW
from transnormer.optim.split_weights import joined, leave_remainder, split

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
        if isinstance(optimizer, RoundedAdamW):
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
@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
def test_bfloat16_parameters_and_their_rest_step_in_float32(grads: torch.dtype) -> None:
    exact = [x.detach().double().requires_grad_() for x in parameters()]
    held = []
    for x in exact:
        high, low = split(x.detach().float())
        held.append(high.requires_grad_())
        leave_remainder(held[-1], low)
    theirs = torch.optim.AdamW(groups(exact), **RATES)
    ours = OneLaunchAdamW(groups(held), **RATES, weight_decay=0.0)
    for _ in range(4):
        for x, y in zip(held, exact, strict=True):
            grad = torch.randn(x.shape).to(grads)
            x.grad_dtype = grads
            x.grad, y.grad = grad, grad.double() * 0.25
        ours.step(factor=torch.tensor(0.25))
        theirs.step()
    for x, y in zip(held, exact, strict=True):
        if not x.numel():
            continue
        weights = joined(x.detach(), ours.state[x]["remainder"])
        assert_close(weights, y.detach(), limit=ADAMW)
        assert (x.detach() - weights).abs().max() <= EPS[torch.bfloat16] / 2 * weights.abs().max()
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert_close(ours.state[x][name], theirs.state[y][name], limit=ADAMW, name=name)


@needs_interpreter
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_the_tensorwise_step_is_the_same_but_for_random_bits(states: torch.dtype) -> None:
    """Parameters of both dtypes; what is rounded at random is one of two neighbours."""
    mixed = [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]
    found = [x.detach().to(d).requires_grad_() for x, d in zip(parameters(), mixed, strict=True)]
    other = [x.detach().clone().requires_grad_() for x in found]
    ours = OneLaunchAdamW(groups(found), **RATES, weight_decay=0.0, states=states)
    theirs = RoundedAdamW(groups(other), **RATES, weight_decay=0.0, states=states)
    run(ours, found, 0.5)
    run(theirs, other, 0.5)
    for x, y in zip(found, other, strict=True):
        if not x.numel():
            continue
        assert list(ours.state[x]) == list(theirs.state[y])
        for a, b in zip((x, *ours.state[x].values()), (y, *theirs.state[y].values())):
            assert a.dtype == b.dtype
            near = 4 * EPS[torch.bfloat16] if states == torch.bfloat16 else ADAMW
            if a.dtype == torch.int16:
                weights = (joined(x.detach(), a), joined(y.detach(), b))
                assert_close(*weights, limit=ADAMW)
                continue
            # Four steps, each rounded up or down.
            assert_close(a.detach().double(), b.detach().double(), limit=near)


@needs_interpreter
def test_random_bits_round_to_a_neighbour_with_the_step_as_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_adamw, "BLOCK", 1024)
    many = 20 * 1024
    x = torch.ones(many, dtype=torch.bfloat16, requires_grad=True)
    x.grad = torch.ones_like(x)
    ours = OneLaunchAdamW(
        [x], lr=1e-3, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0, states=torch.bfloat16
    )
    ours.step()
    # 1 - 1e-3 lies between these two, m = 0.1 and v = 0.01 between two others each.
    below, share = 1 - 2.0**-8, 1e-3 * 2**8
    assert set(x.tolist()) == {1.0, below}
    down = (x < 1).double()
    assert down.mean().item() == pytest.approx(share, abs=4 * (share / many) ** 0.5)
    drawn = [down]
    for name, mean in (("exp_avg", 0.1), ("exp_avg_sq", 0.01)):
        found = ours.state[x][name].double()
        low, high = sorted(set(found.tolist()))
        up, error = (mean - low) / (high - low), 4 * (0.25 / many) ** 0.5
        drawn.append((found > low).double())
        assert drawn[-1].mean().item() == pytest.approx(up, abs=error)
    # Neither the tensors nor the halves of a block share their bits.
    drawn += [drawn[0].view(-1, 2, 512).flip(1).flatten(), drawn[0].roll(512), drawn[0].roll(1024)]
    for number, a in enumerate(drawn[1:], 1):
        correlation = torch.corrcoef(torch.stack([drawn[0], a]))[0, 1].abs()
        assert correlation < 5 / many**0.5, number


@needs_interpreter
def test_random_bits_follow_from_the_step() -> None:
    found = []
    for seed in (1, 2):
        held = parameters(torch.bfloat16)
        torch.manual_seed(seed)
        ours = OneLaunchAdamW(groups(held), **RATES, weight_decay=0.0, states=torch.bfloat16)
        run(ours, held, None)
        found.append(torch.cat([x.detach().flatten() for x in held]))
    assert torch.equal(*found)


@needs_interpreter
def test_neither_steps_nor_parameters_share_their_random_bits() -> None:
    def ones() -> Tensor:
        return torch.ones(500, dtype=torch.bfloat16).requires_grad_()

    held = [ones(), ones()]
    # Without a past every step of the same gradient is the same but for its bits.
    rates = {"lr": 1e-3, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.0}
    ours = OneLaunchAdamW(held, **rates, states=torch.bfloat16)
    found = []
    for _ in range(2):
        for x in held:
            x.grad = torch.ones_like(x)
            with torch.no_grad():
                x.fill_(1.0)
        ours.step()
        found += [x.detach().clone() for x in held]
    for number, x in enumerate(found):
        assert x.unique().numel() == 2
        assert not any(torch.equal(x, y) for y in found[:number])


@needs_interpreter
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one(states: torch.dtype) -> None:
    # All bits set, as GPUs answer, carry over into a number's.
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x = torch.tensor([float("nan"), 1.0, float("inf"), 0.0], dtype=torch.bfloat16)
    x.requires_grad_().grad_dtype = torch.float32
    x.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    x.grad[3] = nan
    OneLaunchAdamW([x], **RATES, weight_decay=0.0, states=states).step()
    assert x.isnan().tolist() == [True, True, False, True]
    assert x[2] == float("inf")


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
    fresh, unmoved = copy.deepcopy((ours, held))
    run(ours, held, None)
    run(fresh, unmoved, None)
    assert all(torch.equal(x, y) for x, y in zip(held, unmoved, strict=True))
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
    x = torch.ones(3, 4, dtype=torch.float16).requires_grad_()
    x.grad = torch.ones_like(x)
    with pytest.raises(TypeError, match="a tensor is torch.float16; expected torch.float32 or"):
        OneLaunchAdamW([x], **RATES, weight_decay=0.0).step()
    z = torch.ones(3, 4).requires_grad_()
    z.grad_dtype = torch.bfloat16
    z.grad = torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="a tensor is torch.bfloat16; expected torch.float32"):
        OneLaunchAdamW([z], **RATES, weight_decay=0.0).step()
    with pytest.raises(TypeError, match="parameters of remainders are torch.float32; expected"):
        ManyTensors([z], [z], [z], [z])
    half = x.detach().bfloat16()
    many = ManyTensors([half], [half], [half])
    with pytest.raises(ValueError, match="seeds are 0; expected 1, one a parameter"):
        many.prepare([half], [], (0.9, 0.9), 1e-8)
    y = torch.ones(4, 3).mT.requires_grad_()
    y.grad = torch.ones_like(y)
    with pytest.raises(ValueError, match="contiguous; use contiguous"):
        OneLaunchAdamW([y], **RATES, weight_decay=0.0).step()
    groups_of_two = [{"params": [y], "betas": (0.5, 0.5)}]
    with pytest.raises(ValueError, match="a group has betas .0.5, 0.5. and eps 1e-06; expected"):
        OneLaunchAdamW(groups_of_two, **RATES, weight_decay=0.0)
