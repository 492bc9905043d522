"""The one generic model: blocks of a token mixer and a channel mixer between two embeddings."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.models import inputs
from transnormer.models.fingerprint import fingerprint
from transnormer.models.label_scores import LabelScores, label_scores
from transnormer.models.resets import reset_others, reset_projections
from transnormer.models.state import DecoderState
from transnormer.nn.channel_mixers import ChannelMixerConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.state import LayerState
from transnormer.nn.token_mixers import TokenMixer, TokenMixerConfig
from transnormer.ops import linear_cross_entropy
from transnormer.ops.checks import autocast_dtype, check_tensor
from transnormer.ops.cross_entropy import IGNORE_INDEX


class BlockConfig(Config):
    """One block: x = x + token_mixer(norm(x)); x = x + channel_mixer(norm(x)).

    Attributes:
        norm: of both residual branches; None leaves it out.
        token_mixer: tagged by its ``kind``.
        channel_mixer: tagged by its ``kind``; None leaves the second branch out.
    """

    norm: NormConfig | None = NormConfig()
    token_mixer: TokenMixerConfig
    channel_mixer: ChannelMixerConfig | None


class DecoderConfig(Config):
    """A whole model.

    Attributes:
        vocab_size: rows of the embedding.
        model_dim: width of the residual stream.
        blocks: one configuration a block; a hybrid is a tuple of different ones.
        final_norm: before the head.
        embedding_scale: multiply embeddings by sqrt(model_dim).
        tie_embeddings: the head is the embedding.
        causal: False is the bidirectional model, which has no state.
        init_std: of all projections and embeddings, N(0, init_std^2).
        dropout: of the embedding and of both residual branches, in training.
        max_positions: learned absolute positions up to this one (an ablation); 0 has none.
        pad_token_id: its embedding row starts at 0.
        bos_token_id, eos_token_id: what generation starts and ends with.
        mask_token_id: what hides a token from a model that was trained to fill it in.
    """

    vocab_size: int = Field(ge=1)
    model_dim: int = Field(ge=1)
    blocks: tuple[BlockConfig, ...] = Field(min_length=1)
    final_norm: NormConfig = NormConfig()
    embedding_scale: bool = True
    tie_embeddings: bool = True
    causal: bool = True
    init_std: float = Field(default=0.02, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    max_positions: int = Field(default=0, ge=0)
    pad_token_id: int | None = Field(default=None, ge=0)
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: int | None = Field(default=None, ge=0)
    mask_token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "DecoderConfig":
        for name in ("pad_token_id", "mask_token_id"):
            index = getattr(self, name)
            if index is not None and index >= self.vocab_size:
                raise ValueError(
                    f"{name} is {index}; expected less than vocab_size, which is {self.vocab_size}"
                )
        return self


class DecoderOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [batch, kept seq, vocab_size] in the model's dtype.
        state: after the last token; None for a bidirectional model.
    """

    logits: Tensor
    state: DecoderState | None


class Block(nn.Module):
    """Pre-norm block with two residual branches."""

    token_mixer: TokenMixer

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        block, dim = config.blocks[layer_index], config.model_dim
        self.token_norm = block.norm.build(dim) if block.norm else nn.Identity()
        self.token_mixer = block.token_mixer.build(
            dim, layer_index, len(config.blocks), causal=config.causal
        )
        self.channel_mixer = None
        if block.channel_mixer is not None:
            self.channel_norm = block.norm.build(dim) if block.norm else nn.Identity()
            self.channel_mixer = block.channel_mixer.build(dim)
        self.dropout = config.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        state: LayerState | None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        drops = not keep_state and self.token_mixer.may_drop_state
        y, state = self.token_mixer(
            self.token_norm(x),
            positions=positions,
            cu_seqlens=cu_seqlens,
            mask=mask,
            state=state,
            shape=shape,
            shared=shared,
            **({"keep_state": False} if drops else {}),
        )
        x = x + self._drop(y)
        if self.channel_mixer is not None:
            x = x + self._drop(self.channel_mixer(self.channel_norm(x)))
        return x, state if keep_state else None


def _shared_parts(config: DecoderConfig) -> nn.ModuleDict:
    """What layers of one kind share, built once, by kind."""
    parts: dict[str, nn.Module] = {}
    for index, block in enumerate(config.blocks):
        mixer = block.token_mixer
        part = mixer.build_shared(config.model_dim, len(config.blocks))
        if part is None:
            continue
        first = parts.setdefault(mixer.kind, part)
        if str(part) != str(first):
            raise ValueError(
                f"blocks[{index}].token_mixer needs {part}; expected {first}, which an earlier "
                f"block of the kind {mixer.kind!r} needs: they share one"
            )
    return nn.ModuleDict(parts)


class Decoder(nn.Module):
    """A language model over token ids; ``DecoderConfig`` says of what parts.

    Training, prefill and decoding are one computation: ``model(a)`` and then ``model(b, state)``
    equals ``model(cat(a, b))`` at every split.

    Attributes:
        autocast_residual: under autocast the residual stream has its dtype too, half the bytes
            between blocks; else that of the embedding. Without autocast it means nothing.
    """

    autocast_residual: bool = False

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        if config.max_positions:
            self.position_embedding = nn.Embedding(config.max_positions, config.model_dim)
        self.shared = _shared_parts(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(len(config.blocks)))
        # Tokens in front of the grid of ``shape``. Read here, since graphs cannot look for a field.
        self._condition_tokens: int = max(
            getattr(block.token_mixer, "condition_tokens", 0) for block in config.blocks
        )
        self._layer_types: tuple[type, ...] = ()
        if config.causal:
            self._layer_types = tuple(map(type, self.empty_state(0, device="meta").layers))
        self.final_norm = config.final_norm.build(config.model_dim)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        # Without memory there is nothing to reset, and no random numbers are spent.
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise everything in place, buffers too: after ``to_empty`` this makes a new model.

        Projections and embeddings N(0, init_std^2), biases 0, the pad row 0, as the released code.
        """
        for part in self.children():
            reset_projections(part, self.config.init_std)
        for part in self.children():
            reset_others(part)
        self.reset_pad_row()

    @torch.no_grad()
    def reset_pad_row(self) -> None:
        """Let the embedding of pads be 0, where there are any."""
        if self.config.pad_token_id is not None:
            self.embedding.weight[self.config.pad_token_id].zero_()

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, [vocab_size, model_dim]."""
        return self.embedding.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(
        self,
        input_ids: Tensor,
        state: DecoderState | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        keep_state: bool = True,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, DecoderState | None]:
        """What the head reads: normed hidden states, [batch, seq, model_dim], and the new state.

        Arguments and errors are ``forward``'s; without keep_state the new state is None.
        ``embeddings``, [batch, seq, model_dim], stand in for those of input_ids, before scaling.
        """
        config = self.config
        inputs.check(input_ids, config.vocab_size, state, cu_seqlens, mask, config.causal)
        if shape is not None:
            lead, packed = self._condition_tokens, cu_seqlens is not None
            inputs.check_shape(shape, input_ids.shape[1], lead, config.causal, packed)
        if state is not None:
            inputs.check_state(state, self._layer_types, input_ids, cu_seqlens)
        mask = inputs.needed_mask(mask)
        where = inputs.positions_of(input_ids, state, positions, cu_seqlens, mask)
        x = self.embedding(input_ids) if embeddings is None else embeddings
        if config.embedding_scale:
            x = x * math.sqrt(config.model_dim)
        if config.max_positions:
            inputs.check_positions(where, config.max_positions)
            x = x + self.position_embedding(where)
        x = F.dropout(x, config.dropout, self.training)
        if self.autocast_residual:
            x = x.to(autocast_dtype(x))
        x = inputs.finite_pads(x, mask)
        layers = []
        shared = {kind: part() for kind, part in self.shared.items()}
        for i, block in enumerate(self.blocks):
            x, layer = block(
                x,
                positions=where,
                cu_seqlens=cu_seqlens,
                mask=mask,
                state=None if state is None else state.layers[i],
                shape=shape,
                shared=shared.get(config.blocks[i].token_mixer.kind),
                keep_state=keep_state,
            )
            layers.append(layer)
        x = self.final_norm(x)
        if not (config.causal and keep_state):
            return x, None
        after = inputs.positions_after(where, state, cu_seqlens, mask)
        return x, DecoderState(tuple(layers), after)

    def forward(
        self,
        input_ids: Tensor,
        *,
        state: DecoderState | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        logits_to_keep: int | None = None,
    ) -> DecoderOutput:
        """Logits of every token, and the state after the last.

        Args:
            input_ids: int64 or int32 [batch, seq], seq >= 1.
            state: continue from here; never modified.
            positions: int64 [batch, seq] or [seq]; None continues from the state (with cu_seqlens
                from each sequence's).
            cu_seqlens: int32 or int64 [num_sequences + 1]: batch is 1 and holds packed sequences;
                state rows are sequences.
            mask: bool [batch, seq]; a False token (a pad) leaves no trace in any state; its own
                logits mean nothing.
            shape: extents of the grid that each row holds, row-major, after the condition tokens
                that a mixer may have; their product is seq. Mixers with axes work in it, by
                coordinates and not by ``positions``; the others read the row as a sequence.
            logits_to_keep: only the last n of each row (of each packed sequence, concatenated).

        Raises:
            ValueError: shapes, ids outside the vocabulary, a state of another model or batch, no
                ``shape`` where a mixer has several axes.
            TypeError: dtypes.
            NotImplementedError: a state for a bidirectional model; ``shape`` for a causal one, or
                with cu_seqlens.
        """
        x, state = self.hidden(input_ids, state, positions, cu_seqlens, mask, shape=shape)
        if logits_to_keep is not None:
            x = inputs.keep_last(x, logits_to_keep, cu_seqlens)
        return DecoderOutput(self.logits(x), state)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normed hidden states, [..., model_dim] -> [..., vocab_size]."""
        return F.linear(x, self.head_weight)

    def summed_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of normed hidden states, [rows, model_dim], against labels [rows]."""
        return linear_cross_entropy(x, self.head_weight, labels, reduction="sum")

    def label_scores(self, input_ids: Tensor, labels: Tensor, **inputs: Any) -> LabelScores:
        """What the model says of labels; see ``label_scores.label_scores``."""
        return label_scores(self, input_ids, labels, **inputs)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        reduction: str = "mean",
        state: DecoderState | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, float32 (float64 for a float64 model), without the full logits.

        Args:
            input_ids: [batch, seq].
            labels: int64 [batch, seq]; position t predicts labels[t]; -100 is ignored.
            reduction: "mean" over the labels that count (0 where there are none), or "sum".
            state, positions, cu_seqlens, mask, shape: as ``forward``'s.

        Raises:
            ValueError: as ``forward``; an unknown reduction, labels of another shape.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
        for name, x in (("input_ids", input_ids), ("labels", labels)):
            check_tensor(name, x)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected input_ids' {list(input_ids.shape)}"
            )
        x, _ = self.hidden(
            input_ids, state, positions, cu_seqlens, mask, shape=shape, keep_state=False
        )
        total = self.summed_loss(x.flatten(0, 1), labels.flatten())
        return total if reduction == "sum" else total / (labels != IGNORE_INDEX).sum().clamp(min=1)

    def empty_state(self, rows: int, *, device: torch.device | str | None = None) -> DecoderState:
        """The state of ``rows`` sequences before their first token; as good as None.

        Args:
            rows: sequences.
            device: None is the model's; "meta" gives shapes without memory.

        Raises:
            NotImplementedError: a bidirectional model, which has no state.
        """
        if not self.config.causal:
            raise NotImplementedError("a bidirectional model (causal=False) has no state")
        weight = self.embedding.weight
        device = weight.device if device is None else device
        return DecoderState(
            tuple(
                module.token_mixer.empty_state(rows, dtype=weight.dtype, device=device)
                for module in self.modules()
                if isinstance(module, Block)
            ),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters, a tied head counted once; without embeddings and head if asked."""
        skip = set() if embeddings else {"embedding", "position_embedding", "lm_head"}
        return sum(p.numel() for n, p in self.named_parameters() if n.split(".")[0] not in skip)

    def fingerprint(self) -> str:
        """A hash of the configuration and the weights, cheap for large models (``fingerprint``)."""
        return fingerprint(self.config.model_dump_json(), self.state_dict())
