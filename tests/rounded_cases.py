"""Updates that are rounded stochastically on the ranks of a layout; importable by them."""

import torch
import torch.distributed as dist
from parallel_cases import train_batch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.optim import OptimizerConfig, build_optimizer, clip_factor
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.train import OneProcess

CONFIG = OptimizerConfig(lr=1e-2, clip=0.05, states="bfloat16")


def train_rounded(
    group: dist.ProcessGroup | None, config: DecoderConfig, axes: Axes, steps: int
) -> dict[str, Tensor]:
    """What this rank holds of a bfloat16 model and its moments after some updates.

    "random" is whether an update left the state of the random numbers as it was.
    """
    torch.manual_seed(3)
    sync = OneProcess()
    if group is not None:
        sync = Layout(axes, torch.device("cpu"), gather_dtype=torch.bfloat16)
    model = sync.wrap(Decoder(config).to(torch.bfloat16))
    optimizer = build_optimizer(model, CONFIG)
    # Of its own, as a run's processes have it.
    torch.manual_seed(100 + sync.process)
    kept = True
    for step in range(steps):
        ids, labels = train_batch(step, config.vocab_size)
        own = slice(sync.rank, None, sync.world_size)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids[own], labels[own], reduction="sum")
        loss.backward()
        optimizer.set_lr(CONFIG.lr)
        before = torch.get_rng_state()
        optimizer.step(clip_factor(CONFIG.clip, sync.total_norm(model)))
        kept = kept and torch.equal(torch.get_rng_state(), before)
        optimizer.zero_grad()
    held = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    found = {
        name: (x.to_local() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in held.items()
    }
    return found | {"random": torch.tensor(kept)}
