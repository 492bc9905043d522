"""LLaMA: the original sizes, and the baseline of the scaling laws of linear attention."""

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.scaling import (
    SCALING_SIZES,
    SCALING_VOCAB_SIZE,
    ScalingSize,
    scaling_size,
)
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import SoftmaxConfig

# Touvron et al. 2023, arXiv:2302.13971, table 2; the GLU widths are the released ones (2/3 of 4 d,
# rounded up to a multiple of 256).
_ORIGINAL = {
    "6.7b": ScalingSize(32, 4096, 32, 11_008),
    "13b": ScalingSize(40, 5120, 40, 13_824),
    "32.5b": ScalingSize(60, 6656, 52, 17_920),
    "65b": ScalingSize(80, 8192, 64, 22_016),
}
SIZES = (*SCALING_SIZES, *_ORIGINAL)
_ORIGINAL_VOCAB_SIZE = 32_000


def llama_custom(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    heads: int,
    glu_dim: int,
    kv_heads: int | None = None,
    rope_base: float = 10_000.0,
    tie_embeddings: bool = False,
) -> DecoderConfig:
    """LLaMA of any size: RMSNorm before rotary softmax attention and SwiGLU, no biases.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if heads < 1 or model_dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads is {kv_heads}; expected a divisor of heads, which is {heads}")
    norm = NormConfig(kind="rms")
    block = BlockConfig(
        norm=norm,
        token_mixer=SoftmaxConfig(heads=heads, kv_heads=kv_heads, rope_base=rope_base),
        channel_mixer=GluConfig(hidden_dim=glu_dim, activation="silu"),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=(block,) * num_layers,
        final_norm=norm,
        embedding_scale=False,
        tie_embeddings=tie_embeddings,
    )


def llama(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """LLaMA of a published size.

    The scaling laws' baseline (Shen et al. 2024, arXiv:2406.16690, tables 2 and 7) has head dim 128,
    a tiktoken vocabulary and a shared embedding.

    Args:
        size: of the scaling laws "70m", "160m", "410m", "1b", "3b" or "7b", whose head is the
            embedding; of the original "6.7b", "13b", "32.5b" or "65b", whose head is its own.
        vocab_size: None is the published vocabulary (100,280; the original's 32,000).

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    original = size in _ORIGINAL
    row = _ORIGINAL[size] if original else scaling_size(size, deeper=True)
    published = _ORIGINAL_VOCAB_SIZE if original else SCALING_VOCAB_SIZE
    config = llama_custom(
        vocab_size=published if vocab_size is None else vocab_size,
        tie_embeddings=not original,
        **row._asdict(),
    )
    if original:
        config = config.model_copy(update={"bos_token_id": 1, "eos_token_id": 2})
    return config
