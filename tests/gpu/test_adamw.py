"""AdamW in one launch on a GPU: its steps at the sizes and alignments of a model."""

import copy

import pytest
import torch
from tolerances import ADAMW, EPS, assert_close
from torch import nn

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.optim import OptimizerConfig, build_optimizer, clip_factor, gradient_norm
from transnormer.optim.one_launch_adamw import OneLaunchAdamW
from transnormer.optim.split_weights import joined

pytestmark = pytest.mark.gpu


def small() -> Decoder:
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=5_001, model_dim=256, num_layers=3, heads=2, glu_dim=333)
    return Decoder(config).cuda()


def test_a_models_steps_are_those_of_torch() -> None:
    model = small()
    exact = copy.deepcopy(model).double()
    ours = build_optimizer(model, OptimizerConfig(lr=1e-2))
    assert isinstance(ours._parts[0], OneLaunchAdamW)
    theirs = build_optimizer(exact, OptimizerConfig(lr=1e-2))
    assert isinstance(theirs._parts[0], torch.optim.AdamW)
    for _ in range(3):
        for x, y in zip(model.parameters(), exact.parameters(), strict=True):
            # Some of them lie between multiples of 16 bytes.
            x.grad = torch.randn(x.numel() + 1, device="cuda")[1:].view_as(x)
            y.grad = x.grad.double()
        norm = nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
        ours.step(clip_factor(1.0, norm))
        theirs.step(clip_factor(1.0, norm))
    for (name, x), y in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert_close(x.detach(), y.detach(), limit=ADAMW, name=name)
    states = theirs.state_tensors()
    for name, x in ours.state_tensors().items():
        assert_close(x, states[name].to(x.device), limit=ADAMW, name=name)


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
def test_bfloat16_weights_and_their_rest_step_in_float32(grads: torch.dtype) -> None:
    model = small().to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    config = OptimizerConfig(lr=1e-2)
    ours, theirs = build_optimizer(model, config), build_optimizer(exact, config)
    assert isinstance(ours._parts[0], OneLaunchAdamW)
    halves = [x for x in model.parameters() if x.dtype == torch.bfloat16]
    for x in halves:
        x.grad_dtype = grads
    for _ in range(3):
        for x, y in zip(model.parameters(), exact.parameters(), strict=True):
            drawn = torch.randn(x.numel() + 1, device="cuda")[1:].view_as(x)
            x.grad = drawn.to(grads if x.dtype == torch.bfloat16 else x.dtype)
            y.grad = x.grad.double()
        norm = gradient_norm(x.grad for x in model.parameters() if x.grad is not None)
        assert_close(
            norm,
            nn.utils.get_total_norm([y.grad for y in exact.parameters() if y.grad is not None]),
            limit=ADAMW,
        )
        ours.step(clip_factor(1.0, norm))
        theirs.step(clip_factor(1.0, norm.double()))
    states, expected = ours.state_tensors(), theirs.state_tensors()
    for (name, x), y in zip(model.named_parameters(), exact.parameters(), strict=True):
        # Angles stay float32.
        rest = states.get(f"{name}/remainder")
        weights = x.detach() if rest is None else joined(x.detach(), rest)
        assert_close(weights, y.detach(), limit=ADAMW, name=name)
        for key in ("exp_avg", "exp_avg_sq"):
            assert_close(states[f"{name}/{key}"], expected[f"{name}/{key}"], limit=ADAMW, name=name)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_what_is_rounded_at_random_is_right_on_average(weights: torch.dtype) -> None:
    model = small().to(weights)
    exact = copy.deepcopy(model).double()
    ours = build_optimizer(model, OptimizerConfig(lr=1e-3, states="bfloat16"))
    assert isinstance(ours._parts[0], OneLaunchAdamW)
    theirs = build_optimizer(exact, OptimizerConfig(lr=1e-3))
    for _ in range(4):
        for x, y in zip(model.parameters(), exact.parameters(), strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.double()
        ours.step()
        theirs.step()
    eps, expected = EPS[torch.bfloat16], theirs.state_tensors()
    states = ours.state_tensors()
    for (name, x), y in zip(model.named_parameters(), exact.parameters(), strict=True):
        held = {"weight": (x.detach(), y.detach())}
        for key in ("exp_avg", "exp_avg_sq"):
            held[key] = (states[f"{name}/{key}"], expected[f"{name}/{key}"])
        for key, (found, wanted) in held.items():
            error = found.double() - wanted
            assert error.abs().max() <= 8 * eps * wanted.abs().max(), (name, key)
            # No more than chance: each number is off by a few roundings of its own.
            scale = wanted.square().mean().sqrt()
            assert error.mean().abs() <= 8 * eps * scale / error.numel() ** 0.5 + 1e-7, (name, key)
