"""LLaMA: the original sizes, and the baseline of the scaling laws of linear attention."""

from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import SoftmaxConfig


class _Size(NamedTuple):
    num_layers: int
    model_dim: int
    heads: int
    glu_dim: int
    original: bool = False


# First the baseline of Shen et al. 2024, arXiv:2406.16690, tables 2 and 7: head dim 128, tiktoken
# vocabulary, a shared embedding. The paper prints 16 heads and a GLU width of 5632 for 1b, which
# give neither its head dim nor its parameters; 12 and 4096 do. Table 2 has 8 heads for 70m and
# 160m, which is not head dim 128.
# Then Touvron et al. 2023, arXiv:2302.13971, table 2; the GLU widths are the released ones
# (2/3 of 4 d, rounded up to a multiple of 256).
SIZES = {
    "70m": _Size(6, 512, 4, 1536),
    "160m": _Size(12, 768, 6, 2048),
    "410m": _Size(26, 1024, 8, 2816),
    "1b": _Size(32, 1536, 12, 4096),
    "3b": _Size(35, 2560, 20, 6912),
    "7b": _Size(32, 4096, 32, 11_008),
    "6.7b": _Size(32, 4096, 32, 11_008, original=True),
    "13b": _Size(40, 5120, 40, 13_824, original=True),
    "32.5b": _Size(60, 6656, 52, 17_920, original=True),
    "65b": _Size(80, 8192, 64, 22_016, original=True),
}
_VOCAB_SIZE, _ORIGINAL_VOCAB_SIZE = 100_280, 32_000


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

    Args:
        size: of the scaling laws "70m", "160m", "410m", "1b", "3b" or "7b", whose head is the
            embedding; of the original "6.7b", "13b", "32.5b" or "65b", whose head is its own.
        vocab_size: None is the published vocabulary (100,280; the original's 32,000).

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    config = llama_custom(
        vocab_size=vocab_size or (_ORIGINAL_VOCAB_SIZE if row.original else _VOCAB_SIZE),
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        heads=row.heads,
        glu_dim=row.glu_dim,
        tie_embeddings=not row.original,
    )
    if row.original:
        config = config.model_copy(update={"bos_token_id": 1, "eos_token_id": 2})
    return config
