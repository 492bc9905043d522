"""What torchtitan needs to know of our models: sizes, how they are shared out, what trains them."""

import torch
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.components.validate import build_validator
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec

from transnormer.integrations.torchtitan.model import DecoderArgs, TitanDecoder
from transnormer.models import zoo
from transnormer.models.compilation import compile_blocks
from transnormer.models.recompute import set_checkpointing
from transnormer.parallel.fsdp import apply_fsdp


def train_spec() -> TrainSpec:
    """Every published causal size as a flavor, with torchtitan's own data, loss and optimizers."""
    sizes = {name: zoo.get(name) for name in zoo.names()}
    return TrainSpec(
        model_cls=TitanDecoder,
        model_args={
            name: DecoderArgs(decoder=config.model_dump(mode="json"))
            for name, config in sizes.items()
            if config.causal
        },
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_text_dataloader,
        build_tokenizer_fn=build_hf_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=build_validator,
    )


def parallelize(
    model: TitanDecoder, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply activation checkpointing, compilation and FSDP2 or HSDP as a job says.

    Gradients are sums over the ranks, undivided: torchtitan divides the loss by the labels of all.

    Args:
        model: on the meta device.
        parallel_dims: the axes of the job.
        job_config: the job.

    Raises:
        NotImplementedError: an axis that this package's own trainer has and torchtitan's cannot use:
            its losses are of whole logits and whole sequences.
    """
    _refuse(parallel_dims, job_config)
    mode = job_config.activation_checkpoint.mode
    set_checkpointing(model.decoder, mode)
    if job_config.compile.enable and "model" in job_config.compile.components:
        compile_blocks(model.decoder, backend=job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        half = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        # Without FSDP the trainer has an autocast of its own.
        model.half = None if half is torch.float32 else half
        apply_fsdp(model.decoder, parallel_dims.get_mesh(names), gather_dtype=model.half)
    return model


def _refuse(parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    for name, wrong in (
        ("tensor_parallel_degree", parallel_dims.tp_enabled),
        ("context_parallel_degree", parallel_dims.cp_enabled),
        ("pipeline_parallel_degree", parallel_dims.pp_enabled),
    ):
        if wrong:
            raise NotImplementedError(
                f"parallelism.{name} is {getattr(job_config.parallelism, name)}; expected 1: the "
                "model shares out data and parameters alone here; transnormer train has tp and sp"
            )
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        raise NotImplementedError(
            "parallelism.data_parallel_shard_degree is 1 beside copies of the model; expected at "
            "least 2; let the ranks share the parameters"
        )
    if job_config.activation_checkpoint.mode == "memory_budget":
        raise NotImplementedError(
            "activation_checkpoint.mode is 'memory_budget'; expected none, selective or full"
        )
