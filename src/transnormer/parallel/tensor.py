"""Tensor parallelism: the heads and channels of each layer on several ranks, applied from outside."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from transnormer.models.decoder import Block, Decoder
from transnormer.nn.channel_mixers import Ffn, Glu
from transnormer.nn.positions import Lrpe
from transnormer.nn.token_mixers.lightning import Lightning, LightningConfig
from transnormer.nn.token_mixers.softmax import Softmax, SoftmaxConfig
from transnormer.parallel.tensor_layers import (
    ColumnLinear,
    DeferredNorm,
    Fused,
    LocalLrpe,
    RowLinear,
    VocabEmbedding,
    VocabHead,
    gathered_logits,
    local,
    slice_buffer,
    vocab_parallel_loss,
)


class TensorParallelDecoder(Decoder):
    """A decoder whose layers lie on several ranks, which all read the same batch.

    ``apply_tensor_parallel`` makes one of a finished model. Names of parameters stay; ``fused`` says
    which of them have their rows in another order than in one process.
    """

    tensor_mesh: DeviceMesh
    fused: dict[str, Fused]

    def summed_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """As ``Decoder.summed_loss``, with the rows of the head on the ranks."""
        weight = local(self.head_weight)
        return vocab_parallel_loss(x, weight, labels, self.config.vocab_size, self.tensor_mesh)

    def logits(self, x: Tensor) -> Tensor:
        """As ``Decoder.logits``, gathered, without a gradient.

        Raises:
            NotImplementedError: a gradient is wanted; ``loss`` has one.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "logits of a model on several ranks have no gradient; use loss, or torch.no_grad"
            )
        weight = local(self.head_weight)
        return gathered_logits(x, weight, self.config.vocab_size, self.tensor_mesh)


def why_not_on_ranks(model: Decoder, layer_index: int, ranks: int) -> str | None:
    """Why the heads of a layer cannot lie on so many ranks; None where they can."""
    block = model.config.blocks[layer_index]
    mixer = block.token_mixer
    hidden = getattr(block.channel_mixer, "hidden_dim", ranks)
    if hidden % ranks:
        return f"channel_mixer.hidden_dim is {hidden}, no multiple of {ranks}"
    if isinstance(mixer, SoftmaxConfig):
        heads = mixer.kv_heads or mixer.heads
        return None if heads % ranks == 0 else f"kv_heads is {heads}, no multiple of {ranks}"
    if not isinstance(mixer, LightningConfig):
        return "its heads share gates, bounds or states with other channels than their own"
    if mixer.heads % ranks:
        return f"heads is {mixer.heads}, no multiple of {ranks}"
    if mixer.lrpe and (mixer.lrpe_form != "doubled" or mixer.lrpe_axes > 1):
        return "the angles of its positions are shared by all heads"
    norm = mixer.norm
    if norm.kind != "srms" or norm.groups > 1 or norm.eps_outside:
        return "only the simple RMS norm over all heads commutes with the projection behind it"
    return None


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> TensorParallelDecoder:
    """Share the heads and channels of a model's layers among ranks; changes the model.

    Projections into heads and channels are cut by outputs, those out of them by inputs: two sums
    forward and two backward a block (Shoeybi et al. 2019, arXiv:1909.08053). The norm over the
    merged heads is exact, see ``DeferredNorm``; embedding and head are cut by rows.

    Args:
        model: the same values on every rank.
        mesh: one axis.

    Raises:
        NotImplementedError: a layer that has no such form; named with the reason.
        TypeError: not a Decoder.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model is a {type(model).__name__}; expected a Decoder")
    for index, block in enumerate(model.config.blocks):
        if (reason := why_not_on_ranks(model, index, mesh.size())) is not None:
            raise NotImplementedError(
                f"blocks[{index}] of kind {block.token_mixer.kind!r}: {reason}; expected another "
                "layer, or parallel.tp = 1"
            )
    for module in list(model.modules()):
        if isinstance(module, Block):
            _share_token_mixer(module.token_mixer, mesh)
            _share_channel_mixer(module.channel_mixer, mesh)
    parts: Any = model
    parts.embedding = VocabEmbedding(model.embedding, mesh)
    if not model.config.tie_embeddings:
        parts.lm_head = VocabHead(model.lm_head, mesh)
    model.__class__ = type("TensorParallelDecoder", (TensorParallelDecoder, type(model)), {})
    assert isinstance(model, TensorParallelDecoder)
    model.tensor_mesh = mesh
    model.fused = {
        f"{name}.{tensor}": module.fused
        for name, module in model.named_modules()
        if isinstance(module, ColumnLinear) and module.fused is not None
        for tensor in ("weight", "bias")
    }
    return model


def _share_token_mixer(mixer: nn.Module, mesh: DeviceMesh) -> None:
    parts: Any = mixer
    if isinstance(mixer, Softmax):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(parts, name, ColumnLinear(getattr(mixer, name), mesh))
        parts.out_proj = RowLinear(mixer.out_proj, mesh)
        return
    assert isinstance(mixer, Lightning)
    config = mixer.config
    fused = Fused(4 if config.gate == "full" else 3, config.heads)
    parts.qkvu_proj = ColumnLinear(mixer.qkvu_proj, mesh, fused)
    if config.gate == "low_rank":
        parts.gate_up_proj = ColumnLinear(mixer.gate_up_proj, mesh)
    if isinstance(mixer.lrpe, Lrpe):
        # A class, not a wrapper: names stay as they are.
        encoding: Any = mixer.lrpe
        encoding.__class__ = LocalLrpe
        encoding.group = mesh.get_group()
        encoding.first_head = config.heads // mesh.size() * mesh.get_local_rank()
    slice_buffer(mixer.decay, "log_decay", mesh)
    norm = DeferredNorm(mixer.norm)
    parts.norm = norm
    parts.out_proj = RowLinear(mixer.out_proj, mesh, norm)


def _share_channel_mixer(mixer: nn.Module | None, mesh: DeviceMesh) -> None:
    parts: Any = mixer
    if isinstance(mixer, Glu):
        parts.gate_proj = ColumnLinear(mixer.gate_proj, mesh)
    if isinstance(mixer, Glu | Ffn):
        parts.up_proj = ColumnLinear(mixer.up_proj, mesh)
        parts.down_proj = RowLinear(mixer.down_proj, mesh)
