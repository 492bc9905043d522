"""Optimizers: what decays, what Muon takes, and state under parameter names."""

import copy

import pytest
import torch
from tolerances import ADAMW, assert_close
from torch import Tensor, nn

from transnormer.config import validate
from transnormer.optim import (
    Optimizer,
    OptimizerConfig,
    build_optimizer,
    clip_factor,
    gradient_norm,
)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.theta = nn.Parameter(torch.randn(2, 1, 3))
        self.bounds = nn.Parameter(torch.randn(2, 3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Part()])


def steps(model: nn.Module, optimizer: Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def state(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_only_matrices_decay() -> None:
    model = Model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.95 if name in ("embedding.weight", "blocks.0.proj.weight") else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "kind", [{}, {"states": "bfloat16"}, {"name": "muon"}], ids=["adamw", "bfloat16", "muon"]
)
def test_gradients_are_multiplied_by_the_factor_first(kind: dict[str, str]) -> None:
    # An eps that small gradients feel: without one their size does not matter to AdamW.
    config = OptimizerConfig.model_validate({"eps": 1.0, **kind})
    found, expected = [], []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Model()
        optimizer = build_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            if not ours:
                parameter.grad *= 0.25
        optimizer.step(torch.tensor(0.25) if ours else None)
        made = found if ours else expected
        made += [*state(model), *optimizer.state_tensors().values()]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_the_factor_clips_as_torch_does(size: float) -> None:
    x = torch.zeros(3, requires_grad=True)
    grad = torch.tensor([2.0, -1.0, 2.0]) / 3 * size
    x.grad = grad.clone()
    norm = nn.utils.clip_grad_norm_([x], 1.0)
    assert torch.equal(grad * clip_factor(1.0, norm), x.grad)


def test_the_norm_of_gradients_is_torchs_and_has_more_than_their_digits() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(300, 7), torch.randn(5), torch.zeros(0, 3), torch.randn(())]
    assert torch.equal(gradient_norm(grads), nn.utils.get_total_norm(grads))
    half = [x.bfloat16() for x in grads]
    exact = torch.cat([x.double().flatten() for x in half]).norm()
    assert_close(gradient_norm(half), exact, limit=ADAMW)
    assert_close(
        gradient_norm([half[0], *grads[1:]]).double(),
        gradient_norm([half[0].double(), *(x.double() for x in grads[1:])]),
        limit=ADAMW,
    )
    assert gradient_norm([x.double() for x in grads]).dtype == torch.float64
    assert gradient_norm([]).item() == 0


def test_adamw_follows_its_formula() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        grad = torch.randn(2, 3, dtype=torch.float64)
        model.weight.grad = grad.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * grad
        second = 0.9 * second + 0.1 * grad**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    groups = build_optimizer(Model(), OptimizerConfig(name="muon")).groups()
    assert {group["optimizer"]: group["names"] for group in groups[:2]} == {
        "muon": ["blocks.0.proj.weight"],
        "adamw": ["embedding.weight"],
    }
    assert groups[2]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_continues_bit_for_bit(name: str) -> None:
    config = OptimizerConfig.model_validate({"name": name})
    model = Model()
    optimizer = build_optimizer(model, config)
    steps(model, optimizer, 3, seed=1)
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, config)
    saved = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    resumed.load_state_tensors(saved)
    steps(model, optimizer, 3, seed=2)
    steps(twin, resumed, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(state(model), state(twin)))


def test_state_of_another_model_is_refused() -> None:
    model = Model()
    optimizer = build_optimizer(model, OptimizerConfig())
    steps(model, optimizer, 1, seed=0)
    tensors = optimizer.state_tensors()
    with pytest.raises(ValueError, match="optimizer state has other"):
        optimizer.load_state_tensors({**tensors, "other/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"embedding.weight/exp_avg has shape \[2\]"):
        optimizer.load_state_tensors({**tensors, "embedding.weight/exp_avg": torch.zeros(2)})
    missing = {k: v for k, v in tensors.items() if k != "embedding.weight/exp_avg"}
    with pytest.raises(ValueError, match="optimizer state of .* is "):
        optimizer.load_state_tensors(missing)


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.embedding.weight.requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig()).groups()
    assert all("embedding.weight" not in group["names"] for group in groups)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="0 trainable parameters"):
        build_optimizer(model, OptimizerConfig())


def test_betas_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^betas is \[0.9, 1.0\]; expected two numbers"):
        validate(OptimizerConfig, {"betas": [0.9, 1.0]}, source="here")
