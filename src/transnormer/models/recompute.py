"""Activation checkpointing: blocks that compute their activations again in the backward pass."""

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from transnormer.models.decoder import Block
from transnormer.models.random_state import drops_in_training
from transnormer.nn.state import LayerState

Checkpointing = Literal["none", "selective", "full"]

_ATEN = torch.ops.aten
# Products of matrices and softmax attention.
_DEAR = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}
# Of the package's ops those whose names hold one of these; gates and positions are cheap.
_DEAR_NAMES = ("attention", "scan", "logcumsumexp")


def _policy(context: Any, op: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Keep what products and attention give; norms, activations, gates and positions are cheap."""
    if op in _DEAR:
        return CheckpointPolicy.MUST_SAVE
    own = getattr(op, "namespace", None) == "transnormer"
    if own and any(name in str(op) for name in _DEAR_NAMES):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _RecomputedBlock(Block):
    """A block of which autograd keeps the inputs, and what ``options`` of checkpoint say."""

    options: ClassVar[dict[str, Any]] = {}
    drops: bool

    def forward(self, x: Tensor, **inputs: Any) -> tuple[Tensor, LayerState | None]:
        """As ``Block.forward``."""
        if not torch.is_grad_enabled():
            return super().forward(x, **inputs)
        return checkpoint(
            super().forward,
            x,
            use_reentrant=False,
            # Only dropout draws random numbers; keeping their state costs time.
            preserve_rng_state=self.drops,
            **self.options,
            **inputs,
        )


class _FullBlock(_RecomputedBlock):
    """A block of which its inputs alone are kept."""


class _SelectiveBlock(_RecomputedBlock):
    """A block of which the outputs of products and attention are kept beside its inputs."""

    options: ClassVar[dict[str, Any]] = {
        "context_fn": partial(create_selective_checkpoint_contexts, _policy)
    }


_CLASSES: dict[Checkpointing, type[Block]] = {
    "none": Block,
    "selective": _SelectiveBlock,
    "full": _FullBlock,
}


def set_checkpointing(model: nn.Module, mode: Checkpointing) -> None:
    """Say what the blocks of a model keep for the backward pass; gradients are the same.

    "none" keeps every activation. "selective" keeps the outputs of matrix products and of attention
    and computes the rest again: element by element, at the speed of memory. "full" keeps the input
    of every block and computes all of it again, a third more operations. Dropout repeats its masks.
    Works under ``torch.compile`` of a block or of the whole model (Chen et al. 2016,
    arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, section 5, for "selective").

    Args:
        model: changed in place, with its adapters if it gets any; names of parameters stay as they
            are.
        mode: replaces what was set before.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _CLASSES:
        raise ValueError(f"checkpointing is {mode!r}; expected one of {', '.join(_CLASSES)}")
    for module in model.modules():
        if isinstance(module, Block):
            # A class, not a wrapper: names, copies and compiled calls stay as they are.
            module.__class__ = _CLASSES[mode]
            if isinstance(module, _RecomputedBlock):
                module.drops = drops_in_training(module)
