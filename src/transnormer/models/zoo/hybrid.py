"""Hybrids: a few softmax layers among linear ones, which restore exact recall."""

from collections.abc import Sequence
from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig, TokenMixerConfig


class _Size(NamedTuple):
    num_layers: int
    model_dim: int
    heads: int
    glu_dim: int


# The ratio and the layers are MiniMax-01's (arXiv:2501.08313, section 2); the size is that of the
# 410m row of the scaling laws (Shen et al. 2024, arXiv:2406.16690), in three periods of eight.
SIZES = {"410m": _Size(24, 1024, 8, 2816)}
_PERIOD = 8
_VOCAB_SIZE = 100_280


def hybrid_custom(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    glu_dim: int,
    pattern: Sequence[TokenMixerConfig],
) -> DecoderConfig:
    """A model whose token mixers repeat a pattern along its depth: RMSNorm, SwiGLU, no biases.

    Args:
        vocab_size, model_dim, glu_dim: widths.
        num_layers: need not be a multiple of the pattern's length.
        pattern: token mixers of any kinds, the first layer's first.

    Raises:
        ValueError: no layers, or no pattern.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if not pattern:
        raise ValueError("pattern is empty; expected at least one token mixer")
    norm = NormConfig(kind="rms")
    channel_mixer = GluConfig(hidden_dim=glu_dim, activation="silu")
    blocks = tuple(
        BlockConfig(norm=norm, token_mixer=pattern[i % len(pattern)], channel_mixer=channel_mixer)
        for i in range(num_layers)
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=blocks,
        final_norm=norm,
        embedding_scale=False,
    )


def hybrid(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """Seven lightning layers to one softmax layer, as in MiniMax-01 (arXiv:2501.08313).

    The lightning layers have SiLU on q, k and v and a sigmoid gate after an RMSNorm, as there; the
    softmax layers turn all channels of a head, where MiniMax-01 turns half of them.

    Args:
        size: "410m".
        vocab_size: None is 100,280.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    lightning = LightningConfig(
        heads=row.heads,
        v_activation="silu",
        gate_activation="sigmoid",
        norm=NormConfig(kind="rms"),
    )
    return hybrid_custom(
        vocab_size=_VOCAB_SIZE if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        glu_dim=row.glu_dim,
        pattern=(*[lightning] * (_PERIOD - 1), SoftmaxConfig(heads=row.heads)),
    )
