"""AdamW in one launch on a GPU: torch's steps, at the sizes and alignments of a model."""

import copy

import pytest
import torch
from tolerances import ADAMW, assert_close
from torch import nn

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.optim import OptimizerConfig, build_optimizer, clip_factor
from transnormer.optim.one_launch_adamw import OneLaunchAdamW

pytestmark = pytest.mark.gpu


def test_a_models_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=5_001, model_dim=256, num_layers=3, heads=2, glu_dim=333)
    model = Decoder(config).cuda()
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
