"""DiagAttention: attention inside blocks, the early layers of TransNormer T1 and T2."""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.block_attention import block_attention, empty_block, grid_block_attention
from transnormer.nn.grid import check_extents
from transnormer.nn.norms import NormConfig
from transnormer.nn.rotary import Rotary
from transnormer.nn.state import KVState
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase


class DiagAttentionConfig(TokenMixerBase):
    """DiagAttention; the defaults are TransNormer T2's.

    Attributes:
        heads: attention heads; head_dim is model_dim / heads.
        block_size: tokens of a block of a sequence.
        block_shape: extents of a block of a grid, in place of block_size; the grid, ``shape`` in the
            call, has as many axes, two or more. None reads a sequence, whatever ``shape`` is.
        weights: of the tokens of a block, from the logits: "softmax" (T2) or "relu" (T1).
        norm: of the merged heads; None leaves it out (T2). T1 needs one: nothing else bounds the
            sum of its weights.
        lrpe: rotate q and k by LRPE in its rotary form, theta learned and shared by the heads; by
            coordinates in a grid, see ``Rotary``.
        bias: of all projections.
    """

    kind: Literal["diag_attention"] = "diag_attention"
    heads: int = Field(ge=1)
    block_size: int = Field(default=64, ge=1)
    block_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] | None = (
        None
    )
    weights: Literal["softmax", "relu"] = "softmax"
    norm: NormConfig | None = None
    lrpe: bool = True
    bias: bool = True

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "DiagAttention":
        if causal and self.block_shape is not None:
            raise NotImplementedError(
                f"block_shape is {self.block_shape}; expected None in a causal model, since a grid "
                "has no one order; use causal=False"
            )
        return DiagAttention(self, model_dim, causal=causal)


def _softmax(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _relu(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.relu().masked_fill(~visible, 0.0) @ v


class DiagAttention(TokenMixer):
    """Attention of each token to its own block of block_size tokens.

    O = concat over heads of P V with P = softmax(Q K^T / sqrt(head_dim)) (T2), or
    relu(Q K^T / sqrt(head_dim)) and SRMSNorm of O (T1), Q and K rotated by LRPE, masked inside the
    block where causal; y = O W_o (Qin et al. 2022, arXiv:2210.10340, section 4.2). Blocks begin at
    every block_size-th real token of a sequence, see ``block_attention``. Pads are in no block (the
    released code lets softmax see the zeros behind a sequence's end in the bidirectional case). The
    state is a ``KVState`` of one block, the one that is not full yet: constant size.

    With block_shape blocks are of neighbours in a grid, as in the paper's model of images (4 x 4),
    see ``grid_block_attention``; how LRPE turns by coordinates is ours, see ``Rotary``.
    """

    def __init__(self, config: DiagAttentionConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        if model_dim % config.heads:
            raise ValueError(f"heads is {config.heads}; expected a divisor of {model_dim}")
        self.config, self.causal = config, causal
        self.head_dim = model_dim // config.heads
        self.qkv_proj = nn.Linear(model_dim, 3 * model_dim, bias=config.bias)
        self.lrpe = None
        if config.lrpe:
            axes = len(config.block_shape or (config.block_size,))
            self.lrpe = Rotary(self.head_dim, learned=True, reflect=True, axes=axes)
        self.norm = config.norm.build(model_dim) if config.norm else None
        self.out_proj = nn.Linear(model_dim, model_dim, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: KVState | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, KVState | None]:
        """As ``TokenMixer.forward``.

        Raises:
            ValueError: with block_shape, no shape or one that does not fit the input.
            NotImplementedError: with block_shape, packed sequences.
        """
        config = self.config
        # The local head count is inferred, so that a slice of the heads runs unchanged.
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x).chunk(3, -1)
        )
        if self.lrpe is not None:
            q, k = self.lrpe((q, k), positions, shape)
        attend = _softmax if config.weights == "softmax" else _relu
        if config.block_shape is None:
            o, state = block_attention(
                q,
                k,
                v,
                attend,
                block_size=config.block_size,
                causal=self.causal,
                state=state,
                cu_seqlens=cu_seqlens,
                mask=mask,
            )
        else:
            if cu_seqlens is not None:
                raise NotImplementedError("cu_seqlens is given; expected None with block_shape")
            extents = check_extents(shape, len(config.block_shape), x.shape[1])
            o = grid_block_attention(
                q, k, v, attend, shape=extents, block_shape=config.block_shape, mask=mask
            )
        o = o.flatten(2)
        return self.out_proj(o if self.norm is None else self.norm(o)), state

    def mixing_flops(self, context: int) -> float:
        config = self.config
        seen = math.prod(config.block_shape or (config.block_size,))
        return 4.0 * min(context, seen) * config.heads * self.head_dim

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVState:
        config = self.config
        return empty_block(
            rows,
            config.block_size,
            config.heads,
            self.head_dim,
            self.head_dim,
            dtype=dtype,
            device=device,
        )
