"""What a rank of the test of torchtitan's adapter computes; importable, for other processes."""

from typing import Any

import torch
import torch.distributed as dist

from transnormer.parallel.mesh import start_processes


def step_in_titan(decoder: dict[str, Any], degrees: dict[str, int]) -> dict[str, float]:
    """Loss and gradient norm of one step, made of torchtitan's pieces as its trainer calls them."""
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed import utils as dist_utils

    from transnormer.integrations.torchtitan.model import DecoderArgs, TitanDecoder
    from transnormer.integrations.torchtitan.spec import parallelize

    torch.set_num_threads(1)
    # It takes a machine without a GPU for one with.
    parallel_dims.device_type = "cpu"
    start_processes("cpu")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    job = JobConfig()
    job.training.mixed_precision_param = "float32"
    job.activation_checkpoint.mode = "full"
    dims = ParallelDims(
        **{"dp_shard": 1, "dp_replicate": 1, **degrees},
        cp=1, tp=1, pp=1, ep=1, etp=1, world_size=ranks,
    )  # fmt: skip
    with torch.device("meta"):
        model = TitanDecoder(DecoderArgs(decoder=decoder))
    model = parallelize(model, dims, job)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    model.train()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(decoder["vocab_size"], (8, 12), generator=generator)
    labels = ids.roll(-1, 1)
    own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    loss_fn = build_cross_entropy_loss(job)
    loss = loss_fn(model(ids[own]), labels[own]) / labels.numel()
    loss.backward()
    norm = dist_utils.clip_grad_norm_(list(model.parameters()), 1.0)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {"loss": float(total), "norm": float(norm)}
