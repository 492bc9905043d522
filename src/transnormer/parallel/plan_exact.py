"""The memory of a training step on one rank of many, by running it on tensors without values.

A process group that sends nothing stands for the others, and torch's memory tracker of FSDP watches
(``torch.distributed._tools``, which is not a public interface of torch).
"""

from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.recompute import Checkpointing, set_checkpointing
from transnormer.parallel.fsdp import apply_fsdp
from transnormer.parallel.mesh import Axes, build_meshes
from transnormer.parallel.tensor import apply_tensor_parallel


def measured_memory(
    config: DecoderConfig,
    axes: Axes,
    tokens: int,
    checkpointing: Checkpointing,
    *,
    cut_residual: bool = False,
) -> dict[str, float]:
    """Bytes of a rank at the peak of its second step, by the tracker's parts, and their "total".

    Ranks that share a sequence count as ranks that share parameters, with a part of the tokens each.

    Args:
        config: the model.
        axes: the layout.
        tokens: that a rank reads at once.
        checkpointing: what blocks keep.
        cut_residual: of ``apply_tensor_parallel``.

    Raises:
        NotImplementedError: layers that so many ranks cannot share.
        RuntimeError: processes have been started here already.
    """
    if dist.is_initialized():
        raise RuntimeError("processes have been started here; expected none; plan in a new one")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=axes.ranks)
    try:
        return _track(config, axes, tokens, checkpointing, cut_residual)
    finally:
        dist.destroy_process_group()


def _track(
    config: DecoderConfig,
    axes: Axes,
    tokens: int,
    checkpointing: Checkpointing,
    cut_residual: bool,
) -> dict[str, float]:
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    held = build_meshes(axes, "cpu").parameters
    mesh = held["dp_replicate", "fsdp"] if axes.dp_replicate > 1 else held["fsdp"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(config)
        set_checkpointing(model, checkpointing)
        if axes.tp > 1:
            apply_tensor_parallel(model, held["tp"], cut_residual=cut_residual)
        with unset_fake_temporarily():
            # It makes meshes, whose ranks are read; what it makes of fake parameters is fake.
            apply_fsdp(model, mesh, gather_dtype=torch.bfloat16)

        def loss(self: Decoder, ids: Tensor) -> Tensor:
            return type(self).loss(self, ids, ids, reduction="sum")

        # The tracker follows calls of modules, and a decoder trains by its loss.
        model.forward = MethodType(loss, model)
        # One parameter at a time: the fused step's temporaries would be counted as its state.
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with tracker:
            for step in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    nats = model(ids)
                nats.backward()
                if step == 0:
                    # It makes the state. What else it makes counts in neither step: a fused update
                    # makes nothing.
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
                    tracker._peak_mem.clear()
                    tracker._peak_mem_snap.clear()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(name).rpartition(".")[2].lower(): float(size) for name, size in peak.items()}
