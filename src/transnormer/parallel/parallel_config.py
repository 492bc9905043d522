"""The [parallel] table of a run: how its processes share the work."""

from typing import Literal

from pydantic import Field, model_validator

from transnormer.config import Config
from transnormer.parallel.mesh import Axes
from transnormer.parallel.outer_config import OuterTable


class ParallelConfig(Config):
    """Ranks along each mesh axis; their product is the number of processes.

    Attributes:
        dp_replicate: copies of the model, each with batches of its own.
        dp_shard: ranks with batches of their own that share the parameters of a copy (FSDP). None
            is as many as the processes leave.
        sp: ranks that read each sequence together, a part each.
        tp: ranks that share the heads and channels of each layer.
        sp_exchange: how states pass between the parts: "gather" all to all, "ring" from rank to
            rank, "scan" so in blocks, for many ranks.
        sp_overlap: let the exchange run beside the attention within the parts, for two more
            products a layer: for slow links.
        tp_residual: between blocks every rank of tp holds all tokens ("whole") or its part of them
            ("cut"): less memory and work outside of the mixers, for the same bytes sent.
        outer: lets the copies of dp_replicate go apart and meet every tau updates; None sums the
            gradients of all copies in every step.
    """

    dp_replicate: int = Field(default=1, ge=1)
    dp_shard: int | None = Field(default=None, ge=1)
    sp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    sp_exchange: Literal["gather", "ring", "scan"] = "gather"
    sp_overlap: bool = False
    tp_residual: Literal["whole", "cut"] = "whole"
    outer: OuterTable | None = None

    @model_validator(mode="after")
    def _check_outer(self) -> "ParallelConfig":
        if self.outer is not None and self.dp_replicate == 1:
            raise ValueError(
                "dp_replicate is 1 beside [parallel.outer]; expected at least 2 copies that go "
                "apart and meet; set it, or leave the table out"
            )
        return self

    @model_validator(mode="after")
    def _check_axes(self) -> "ParallelConfig":
        meant_for = {"sp_exchange": "sp", "sp_overlap": "sp", "tp_residual": "tp"}
        for key, axis in meant_for.items():
            value = getattr(self, key)
            if getattr(self, axis) == 1 and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {value!r} where {axis} is 1; expected {axis} of at least 2: without "
                    f"that axis it means nothing; set {axis}, or leave {key} out"
                )
        return self

    def axes(self, processes: int) -> Axes:
        """The axes of so many processes.

        Raises:
            ValueError: the product of the axes is another number.
        """
        others = self.dp_replicate * self.sp * self.tp
        shard = max(processes // others, 1) if self.dp_shard is None else self.dp_shard
        axes = Axes(self.dp_replicate, shard, self.sp, self.tp)
        if axes.ranks != processes:
            shown = " x ".join(f"{name} {size}" for name, size in axes._asdict().items())
            raise ValueError(
                f"parallel is {shown}, {axes.ranks} ranks; expected as many as the {processes} "
                "processes that were started; change the table, or start with torchrun "
                f"--nproc-per-node {axes.ranks}"
            )
        return axes
