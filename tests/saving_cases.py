"""What the ranks of the tests of checkpoints do; importable, since other processes run it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import train_batch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from train_cases import constant_evaluation

from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.optim import OptimizerConfig, build_optimizer
from transnormer.parallel import save_shares as saving
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.shares import fill, share_of
from transnormer.parallel.tensor_layers import Fused
from transnormer.train import RunConfig, run_training

FUSED = Fused((12, 8, 4), 2)
PLACEMENTS: dict[str, tuple[Placement, Placement]] = {
    "rows": (Shard(0), Replicate()),
    "columns": (Shard(0), Shard(1)),
    "last": (Replicate(), Shard(2)),
    "whole": (Replicate(), Replicate()),
}


def whole_tensors() -> dict[str, Tensor]:
    """Tensors of sizes that do not divide, of several dtypes, one without dims."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "rows": normal(7, 3),
        "columns": normal(5, 6, 2).to(torch.bfloat16),
        "last": normal(2, 3, 4).double(),
        "whole": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "fused": normal(24, 5),
    }


def laid_out(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on a mesh of 2 x 2 ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    found: dict[str, Tensor] = {"scalar": whole["scalar"]}
    for name, placements in PLACEMENTS.items():
        found[name] = distribute_tensor(whole[name], mesh, placements, src_data_rank=None)
    # Cut among layers' ranks, and what each has by rows, as FSDP cuts it.
    by_rank = FUSED.by_rank(whole["fused"])
    rows = by_rank.chunk(2)[mesh["tp"].get_local_rank()]
    local = rows.chunk(2)[mesh["fsdp"].get_local_rank()].clone()
    from torch.distributed.tensor.placement_types import _StridedShard

    found["fused"] = DTensor.from_local(
        local, mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False,
        shape=by_rank.shape, stride=by_rank.stride(),
    )  # fmt: skip
    return found


def write_and_read(group: dist.ProcessGroup, folder: Path) -> list[str]:
    """Write tensors from their shares; the names of those that a rank reads back otherwise."""
    tensors = laid_out(whole_tensors())
    shares = {n: share_of(x, FUSED if n == "fused" else None) for n, x in tensors.items()}
    saving.save_shares(shares, folder, "model", group)
    wrong = []
    for name, share in shares.items():
        before = [piece.values.clone() for piece in share.pieces]
        for piece in share.pieces:
            piece.values.zero_()
        fill(share, whole_tensors()[name])
        after = [piece.values for piece in share.pieces]
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            wrong.append(name)
    return wrong


def write_broken(group: dist.ProcessGroup, folder: Path, why: Exception) -> tuple[str, str]:
    """Write while that happens to the third rank; what this rank is told: type and text."""
    shares = {n: share_of(x) for n, x in laid_out(whole_tensors()).items() if n != "fused"}
    whole = os.pwrite

    def refuse(*args: object) -> int:
        raise why

    if dist.get_rank() == 2:
        os.pwrite = refuse
    try:
        saving.save_shares(shares, folder, "model", group)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        os.pwrite = whole
    return "", ""


def staged_while_it_trains(
    group: dist.ProcessGroup, config: DecoderConfig, folder: Path
) -> dict[str, Tensor]:
    """Stage a model, change it, and only then write it; what it was, on the first rank."""
    torch.manual_seed(3)
    layout = Layout(Axes(dp_shard=2, tp=2), torch.device("cpu"))
    model = layout.wrap(Decoder(config))
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-2))
    staged = layout.stage(model, optimizer, HostCopies())
    before = layout.whole(model, optimizer)
    ids, labels = train_batch(0, config.vocab_size)
    model.loss(ids[layout.rank :: 2], labels[layout.rank :: 2], reduction="sum").backward()
    optimizer.set_lr(1e-2)
    optimizer.step()
    staged.write(folder, tokenizer_fingerprint=None)
    return {} if before is None else {n: x.clone() for n, x in before[0].state_dict().items()}


def run_with_a_full_disk(group: dist.ProcessGroup, config: RunConfig, rank: int) -> str:
    """A run whose checkpoints one rank cannot write; what this rank is told."""
    whole = os.pwrite

    def refuse(*args: object) -> int:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == rank:
        os.pwrite = refuse
    layout = Layout(Axes(dp_shard=dist.get_world_size()), torch.device("cpu"))
    try:
        run_training(config, evaluate=constant_evaluation, sync=layout)
    except RuntimeError as error:
        return str(error)
    finally:
        os.pwrite = whole
    return ""
