"""Tensor parallelism: the heads and channels of each layer on several ranks, applied from outside."""

import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from transnormer.models.decoder import Block, Decoder
from transnormer.nn.norms import Norm
from transnormer.nn.token_mixers import Gau
from transnormer.parallel.tensor_layers import (
    Fused,
    OnRanks,
    PlaceChannels,
    RowLinear,
    SharesEnter,
    TensorAxis,
    VocabEmbedding,
    VocabHead,
    local,
    mix_in,
    share,
    share_norm,
)
from transnormer.parallel.tensor_loss import gathered_logits, vocab_parallel_loss
from transnormer.parallel.tensor_rules import OF_UNITS, Rule, rule_of, why_not_on_ranks


class TensorParallelDecoder(Decoder):
    """A decoder whose layers lie on several ranks, which all read the same batch.

    ``apply_tensor_parallel`` makes one of a finished model. Names of parameters stay; ``fused`` says
    which of them have their entries in another order than in one process.
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


def apply_tensor_parallel(
    model: Decoder, mesh: DeviceMesh, *, cut_residual: bool = False
) -> TensorParallelDecoder:
    """Share the heads and channels of a model's layers among ranks; changes the model.

    Projections into heads and channels are cut by outputs, those out of them by inputs: two sums
    forward and two backward a block (Shoeybi et al. 2019, arXiv:1909.08053). A norm over the merged
    heads has one more each way, of a number a token, and a layer norm two, see ``SharedNorm``.
    Embedding and head are cut by rows. ``tensor_rules`` has what is cut of each kind of mixer.

    Args:
        model: the same values on every rank.
        mesh: one axis.
        cut_residual: between blocks each rank holds its part of the tokens alone, see
            ``TensorAxis`` (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2). What a block
            works on is the whole sequence all the same.

    Raises:
        NotImplementedError: a layer that has no such form; named with the reason. Dropout, where
            the stream is cut: ranks draw the same numbers.
        TypeError: not a Decoder.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model is a {type(model).__name__}; expected a Decoder")
    for index, block in enumerate(model.config.blocks):
        if (reason := why_not_on_ranks(model, index, mesh.size())) is not None:
            raise NotImplementedError(
                f"blocks[{index}] of kind {block.token_mixer.kind!r}: {reason}; expected another "
                "layer, or another parallel.tp"
            )
    if cut_residual and model.config.dropout:
        raise NotImplementedError(
            f"dropout is {model.config.dropout}; expected 0 where ranks hold parts of the tokens; "
            "set parallel.tp_residual to 'whole'"
        )
    axis = TensorAxis(mesh, cut_residual=cut_residual)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in model.shared.modules():
        share(module, axis, OF_UNITS.get(type(module), {}))
    for block in blocks:
        _share_block(block, axis)
        mix_in(block, SharesEnter)
    if cut_residual:
        for block in blocks:
            share(block, axis, {}, kind=_CutBlock)
        blocks[0].__dict__["cuts"] = blocks[-1].__dict__["joins"] = True
    parts: Any = model
    parts.embedding = VocabEmbedding(model.embedding, mesh)
    if not model.config.tie_embeddings:
        parts.lm_head = VocabHead(model.lm_head, mesh)
    mix_in(model, TensorParallelDecoder)
    assert isinstance(model, TensorParallelDecoder)
    model.tensor_mesh = mesh
    model.fused = {
        f"{name}.{tensor}": fused
        for name, module in model.named_modules()
        if isinstance(module, OnRanks)
        for tensor, fused in module.fused.items()
    }
    return model


class _TokensEnter(OnRanks):
    """A token mixer on ranks: what it reads comes from the residual stream of all of them."""

    def forward(self, x: Tensor, *, positions: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        x = self.axis.enter(x)[:, : positions.shape[1]]
        return super().forward(x, positions=positions, **inputs)


class _ChannelsEnter(OnRanks):
    """A channel mixer on ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.axis.enter(x))


class _OwnChannels(OnRanks):
    """A token mixer without projections, each rank for its own channels."""

    def forward(self, x: Tensor, *, positions: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        axis = self.axis
        x = axis.enter(x)[:, : positions.shape[1]].chunk(axis.ranks, -1)[axis.rank]
        y, state = super().forward(x, positions=positions, **inputs)
        return axis.place(y), state


class _CutBlock(OnRanks):
    """A block between whose branches each rank holds its part of the tokens."""

    cuts = joins = False

    def forward(self, x: Tensor, *, positions: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        x = self.axis.own_tokens(x) if self.cuts else x
        x, state = super().forward(x, positions=positions, **inputs)
        return self.axis.all_tokens(x, positions.shape[1]) if self.joins else x, state


def _share_block(block: Block, axis: TensorAxis) -> None:
    for name, enter in (("token_mixer", _TokensEnter), ("channel_mixer", _ChannelsEnter)):
        mixer = getattr(block, name)
        if mixer is not None:
            rule = rule_of(mixer)
            assert rule is not None
            _share_mixer(mixer, rule, axis, enter if rule.out else _OwnChannels)
    if axis.cut_residual:
        for name in ("token_norm", "channel_norm"):
            if isinstance(norm := getattr(block, name, None), Norm):
                share(norm, axis, {})


def _share_mixer(mixer: nn.Module, rule: Rule, axis: TensorAxis, kind: type[OnRanks]) -> None:
    norm, out = (getattr(mixer, name, None) for name in ("norm", rule.out))
    norm = norm if rule.norm and isinstance(norm, Norm) else None
    sizes = {name: parts(mixer) for name, parts in rule.fused.items()}
    for path, module in list(mixer.named_modules()):
        if module is norm or module is out or module is mixer:
            continue
        fused = Fused(sizes[path], axis.ranks, 0, rule.whole_last) if path in sizes else None
        dims = {**OF_UNITS.get(type(module), {}), **_dims_below(path + ".", rule)}
        if path in sizes or path in rule.columns:
            dims = {"weight": 0, "bias": 0}
        share(module, axis, dims, fused=fused)
    if norm is not None:
        share_norm(norm, axis, rule.parts)
    if isinstance(out, nn.Linear):
        channels = (out.in_features // rule.parts,) * rule.parts
        fused = Fused(channels, axis.ranks, 1) if rule.parts > 1 else None
        share(out, axis, {"weight": 1}, kind=RowLinear, fused=fused)
    elif out is not None:
        share(out, axis, {}, kind=PlaceChannels)
    for path in rule.units.values():
        _divide(mixer, path, axis.ranks)
    if isinstance(mixer, Gau) and mixer.linear:
        # As wide as before, or narrower.
        mixer.groups //= math.gcd(mixer.groups, axis.ranks)
    share(mixer, axis, _dims_below("", rule), kind=kind)


def _dims_below(prefix: str, rule: Rule) -> dict[str, int]:
    """Tensors of one module that a rule names, and their dims."""
    names = {path: path.removeprefix(prefix) for path in rule.tensors if path.startswith(prefix)}
    return {name: rule.tensors[path] for path, name in names.items() if "." not in name}


def _divide(mixer: Any, path: str, ranks: int) -> None:
    """Make a number of the mixer, or of its configuration, that of one rank."""
    owner, _, name = path.rpartition(".")
    number = attrgetter(path)(mixer) // ranks
    if owner == "config":
        mixer.config = mixer.config.model_copy(update={name: number})
    else:
        setattr(attrgetter(owner)(mixer) if owner else mixer, name, number)
