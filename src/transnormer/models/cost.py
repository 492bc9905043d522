"""What a model costs: parameters, state, operations and bytes, without running it."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import nn

from transnormer.models.decoder import Block, Decoder, DecoderConfig
from transnormer.nn.state import KVState, LayerState, state_bytes, tensors_of
from transnormer.nn.token_mixers import TokenMixer


class Flops(NamedTuple):
    """Floating-point operations of one token's forward pass, 2 a multiply-add.

    Attributes:
        projections: products with the matrices of the blocks (``nn.Linear``).
        mixing: what token mixers compute beside them, see ``TokenMixer.mixing_flops``.
        head: the product with the head.
    """

    projections: float
    mixing: float
    head: float

    @property
    def blocks(self) -> float:
        """Without the head."""
        return self.projections + self.mixing

    @property
    def total(self) -> float:
        return self.projections + self.mixing + self.head


@dataclass(frozen=True)
class ModelCost:
    """Costs of a model, from its configuration alone.

    Attributes:
        parameters: all of them, a tied head counted once.
        without_embeddings: without embeddings and head.
        active_parameters: the matrices that each token is multiplied with, the head among them;
            twice as many operations are its forward pass but for the mixing of tokens.
        stored_bytes: of all parameters.
        weight_bytes: of what a decoding step reads once for all rows: everything but an embedding
            that is not also the head.
        constant_state_bytes: of one sequence's state, whatever its length.
        state_bytes_per_token: what each token adds to it (caches of keys and values); 0 for models
            that are recurrent throughout, and for bidirectional ones, which have no state.
    """

    parameters: int
    without_embeddings: int
    active_parameters: int
    stored_bytes: int
    weight_bytes: int
    constant_state_bytes: int
    state_bytes_per_token: int
    _mixers: tuple[TokenMixer, ...]
    _head_parameters: int

    @classmethod
    def of(cls, config: DecoderConfig, dtype: torch.dtype = torch.bfloat16) -> Self:
        """The costs of a model whose weights and activations have ``dtype``."""
        with torch.device("meta"):
            model = Decoder(config).to(dtype)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        matrices = sum(
            module.weight.numel()
            for block in blocks
            for module in block.modules()
            if isinstance(module, nn.Linear)
        )
        constant, growing = 0, 0
        if config.causal:
            for layer in model.empty_state(1, device="meta").layers:
                constant += state_bytes(layer)
                growing += bytes_per_token(layer)
        every = {name: x.numel() * x.element_size() for name, x in model.named_parameters()}
        unread = 0 if config.tie_embeddings else every["embedding.weight"]
        head = model.head_weight.numel()
        return cls(
            parameters=model.num_parameters(),
            without_embeddings=model.num_parameters(embeddings=False),
            active_parameters=matrices + head,
            stored_bytes=sum(every.values()),
            weight_bytes=sum(every.values()) - unread,
            constant_state_bytes=constant,
            state_bytes_per_token=growing,
            _mixers=tuple(block.token_mixer for block in blocks),
            _head_parameters=head,
        )

    def flops(self, context: int) -> Flops:
        """Of the forward pass of a token that sees ``context`` tokens, itself included.

        A sequence of n tokens costs on average ``flops((n + 1) // 2)`` a token where it is causal,
        ``flops(n)`` where it is not. Training costs three times as much: the backward pass is two
        products for each one.
        """
        if context < 1:
            raise ValueError(f"context is {context}; expected at least 1, the token itself")
        return Flops(
            projections=2.0 * (self.active_parameters - self._head_parameters),
            mixing=sum(mixer.mixing_flops(context) for mixer in self._mixers),
            head=2.0 * self._head_parameters,
        )

    def state_bytes(self, context: int) -> int:
        """Of one sequence's state after ``context`` tokens."""
        return self.constant_state_bytes + context * self.state_bytes_per_token

    def decode_bytes(self, rows: int, context: int) -> int:
        """Moved by a decoding step of ``rows`` sequences with ``context`` tokens behind them.

        Weights are read once; a constant state is read and written; a cache is read, and one token
        is written. Activations do not count.
        """
        state = 2 * self.constant_state_bytes + (context + 1) * self.state_bytes_per_token
        return self.weight_bytes + rows * state


def bytes_per_token(layer: LayerState) -> int:
    """What a token adds to a layer's state: the slot of a cache that is empty before the first."""
    if not isinstance(layer, KVState) or layer.valid.shape[1]:
        return 0
    return sum(x[:, :1].new_empty(1, *x.shape[2:]).nbytes for x in tensors_of(layer))
