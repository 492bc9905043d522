"""What a block keeps for its backward pass, of whatever kind: counted on tensors without values."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from transnormer.models.decoder import Block, DecoderConfig

# Long enough that a token more is a token's worth more, whatever the chunks of the ops.
_TOKENS = 2048


class Kept(NamedTuple):
    """Bytes a token that one block keeps under bfloat16 autocast, with a float32 residual stream.

    Attributes:
        outside: of the stream and its norms, which ranks that share layers all keep.
        inside: of the mixers, which they share.
    """

    outside: float
    inside: float


@cache
def kept_by(config: DecoderConfig, layer_index: int) -> Kept:
    """Run a block forward on fake tensors of two lengths, and count what autograd saves.

    What grows faster than the length counts as between 2,048 and 4,096 tokens.

    Raises:
        NotImplementedError: a bidirectional model, whose layers may need a grid.
    """
    if not config.causal:
        raise NotImplementedError(
            "causal is False; expected a causal model: blocks of others may need a grid to run on"
        )
    first, second = (_saved(config, layer_index, n) for n in (_TOKENS, 2 * _TOKENS))
    block, dim = config.blocks[layer_index], config.model_dim
    branches = 1 if block.channel_mixer is None else 2
    # Of a branch the stream in float32, which its norm reads, and what the projections read.
    outside = branches * (2.0 if block.norm is None else 6.0) * dim
    return Kept(outside, max((second - first) / _TOKENS - outside, 0.0))


def _saved(config: DecoderConfig, layer_index: int, tokens: int) -> int:
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        # Held, so that no other storage gets the same address.
        held.append(x)
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        block = Block(config, layer_index)
        mixer = config.blocks[layer_index].token_mixer
        part: Any = mixer.build_shared(config.model_dim, len(config.blocks))
        shared = None if part is None else part()
        x = torch.zeros(1, tokens, config.model_dim, requires_grad=True)
        positions = torch.arange(tokens)[None]
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            block(
                x, positions=positions, cu_seqlens=None, mask=None, state=None, shared=shared,
                keep_state=False,
            )  # fmt: skip
    return sum(size for storage, size in storages.items() if storage not in own)
