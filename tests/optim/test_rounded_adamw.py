"""AdamW of what is bfloat16: its rounding, its agreement with AdamW, its state."""

import pytest
import torch
from optim.test_optimizers import Model, state, steps
from tolerances import ADAMW, EPS, assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from transnormer.config import validate
from transnormer.optim import OptimizerConfig, build_optimizer
from transnormer.optim.rounded_adamw import round_stochastically
from transnormer.optim.split_weights import joined

ROUNDED = OptimizerConfig(states="bfloat16")


def test_rounding_goes_to_a_neighbour_with_x_as_the_mean() -> None:
    low, gap = 1.0, EPS[torch.bfloat16]
    for share in (0.0, 0.25, 0.9):
        for sign in (1, -1):
            x = torch.full((40_000,), sign * (low + share * gap))
            found = round_stochastically(x)
            assert set(found.tolist()) <= {sign * low, sign * (low + gap)}
            up = (found.float().abs() > low).double().mean().item()
            assert up == pytest.approx(share, abs=4 * (0.25 / 40_000) ** 0.5)


def test_rounding_keeps_what_bfloat16_holds() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**100, torch.finfo(torch.bfloat16).tiny])
    assert torch.equal(round_stochastically(x).float(), x)


def test_rounding_keeps_every_nan() -> None:
    # All bits set is what GPUs answer; one bit alone is the nearest to infinity.
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    for _ in range(20):
        assert round_stochastically(bits.view(torch.float32)).isnan().all()


def test_moments_are_half_as_large_and_the_path_is_near() -> None:
    models = [nn.Linear(64, 64, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0].weight.detach().clone()
    found = []
    for model, config in zip(models, (OptimizerConfig(lr=1e-2), ROUNDED.model_copy())):
        config = config.model_copy(update={"lr": 1e-2, "betas": (0.9, 0.999)})
        optimizer = build_optimizer(model, config)
        steps(model, optimizer, 50, seed=3)
        tensors = optimizer.state_tensors()
        found.append(sum(x.nbytes for x in tensors.values() if x.ndim))
    assert found[1] * 2 == found[0]
    moved = (models[0].weight - start).norm()
    # Each moment is off by a rounding of 2^-8 at most, at random.
    assert (models[1].weight - models[0].weight).norm() < 2 * EPS[torch.bfloat16] * moved


def test_small_steps_of_a_moment_are_not_lost() -> None:
    # To the nearest, v would stay at 1 for ever: its steps are a thousandth of it.
    model = nn.Linear(32, 32, bias=False)
    config = ROUNDED.model_copy(update={"betas": (0.9, 0.999), "lr": 1e-9})
    optimizer = build_optimizer(model, config)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    tensors = {name: x.clone() for name, x in optimizer.state_tensors().items()}
    tensors["weight/exp_avg_sq"].fill_(1.0)
    optimizer.load_state_tensors(tensors)
    model.weight.grad = torch.zeros_like(model.weight)
    for _ in range(100):
        optimizer.step()
    left = optimizer.state_tensors()["weight/exp_avg_sq"].float().mean().item()
    assert left == pytest.approx(0.999**100, rel=0.005)


def test_small_updates_of_a_bfloat16_parameter_are_not_lost() -> None:
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, ROUNDED.model_copy(update={"lr": 1e-4, "weight_decay": 0}))
    # Each update is 1e-4, a fortieth of the last place at 1.
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.float().mean().item() == pytest.approx(0.99, abs=2e-4)


def test_float32_states_hold_the_rest_of_bfloat16_weights() -> None:
    torch.manual_seed(6)
    model = Model().to(torch.bfloat16)
    exact = Model().double()
    exact.load_state_dict(model.state_dict())
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    ours, theirs = build_optimizer(model, config), build_optimizer(exact, config)
    for _ in range(5):
        for x, y in zip(model.parameters(), exact.parameters(), strict=True):
            x.grad = torch.randn(x.shape).bfloat16()
            y.grad = x.grad.double() * 0.5
        ours.step(torch.tensor(0.5))
        theirs.step()
    states, expected = ours.state_tensors(), dict(exact.named_parameters())
    for name, x in model.named_parameters():
        weights = joined(x.detach(), states[f"{name}/remainder"])
        assert_close(weights, expected[name].detach(), limit=ADAMW, name=name)
        assert states[f"{name}/exp_avg"].dtype == torch.float32


def test_the_order_of_a_state_is_nothing_to_it() -> None:
    models = [nn.Linear(8, 8).to(torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (build_optimizer(model, OptimizerConfig(lr=1e-2)) for model in models)
    for parameter in models[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_tensors(dict(reversed(first.state_tensors().items())))
    for optimizer, model in zip((first, second), models):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(map(torch.equal, state(models[0]), state(models[1])))


def test_states_without_the_weights_are_refused() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {x: y for x, y in optimizer.state_tensors().items() if not x.endswith("/remainder")}
    with pytest.raises(
        ValueError, match="weight is .*expected .*'remainder', 'step'.; take another"
    ):
        optimizer.load_state_tensors(tensors)


def twins(
    dtype: torch.dtype, backend: str | None, config: OptimizerConfig = ROUNDED
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Parameters and state after four steps, with a rate and a decay of its own in each."""
    torch.manual_seed(4)
    model = Model().to(dtype)
    optimizer = build_optimizer(
        model, config.model_copy(update={"weight_decay": 0.1}), compile_backend=backend
    )
    generator = torch.Generator().manual_seed(5)
    for step in range(4):
        optimizer.set_lr(0.01 * (step + 1))
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return state(model), optimizer.state_tensors()


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, ROUNDED),
        (torch.bfloat16, ROUNDED),
        (torch.bfloat16, OptimizerConfig()),
    ],
    ids=["moments", "all", "copies"],
)
def test_a_compiled_step_is_the_same(dtype: torch.dtype, config: OptimizerConfig) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = twins(dtype, None, config), twins(dtype, counter, config)
    for x, y in zip(plain[0], compiled[0], strict=True):
        assert_close(y.double(), x.double(), limit=EPS[dtype])
    rest = [[x for x in made[1].values() if x.dtype == torch.int16] for made in (plain, compiled)]
    for x, low, y, other in zip(plain[0], rest[0], compiled[0], rest[1]):
        assert_close(joined(y, other), joined(x, low), limit=ADAMW)
    for name, x in plain[1].items():
        if x.dtype == torch.int16:
            continue
        # The compiler's sums differ in the last place of a float32.
        limit = 0.0 if x.dtype == torch.bfloat16 else ADAMW
        assert_close(compiled[1][name], x, limit=limit, name=name)
    # As many graphs for six shapes as for two: they do not know sizes, steps and rates.
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_compiled_by_inductor_is_near(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    plain, compiled = twins(dtype, None)[0], twins(dtype, "inductor")[0]
    # It draws other random numbers.
    for x, y in zip(plain, compiled, strict=True):
        assert (x - y).norm() <= 2 * EPS[torch.bfloat16] * x.norm()


def run(count: int, seed: int, saved: dict[str, Tensor] | None, model: Model) -> dict[str, Tensor]:
    optimizer = build_optimizer(model, ROUNDED)
    if saved is not None:
        optimizer.load_state_tensors(saved)
    steps(model, optimizer, count, seed)
    return {name: x.clone() for name, x in optimizer.state_tensors().items()}


def test_state_continues_bit_for_bit() -> None:
    model = Model()
    saved = run(3, 1, None, model)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    random = torch.get_rng_state()
    first = run(3, 2, saved, model)
    torch.set_rng_state(random)
    second = run(3, 2, saved, twin)
    assert all(map(torch.equal, state(model), state(twin)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_dtypes_and_muon_are_refused() -> None:
    with pytest.raises(TypeError, match="a parameter is torch.float64; expected float32 or"):
        build_optimizer(nn.Linear(2, 2).double(), ROUNDED)
    with pytest.raises(ValueError, match="states is 'bfloat16'; expected 'float32' for name"):
        validate(OptimizerConfig, {"name": "muon", "states": "bfloat16"}, source="here")
