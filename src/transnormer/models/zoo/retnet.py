"""RetNet in the sizes of torchscale, and one beside TransNormerLLM-385M."""

from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig, GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import RetentionConfig


class _Size(NamedTuple):
    num_layers: int
    model_dim: int
    heads: int
    value_width: int
    hidden_dim: int
    glu: bool = True


# torchscale's architectures (Sun et al. 2023, arXiv:2307.08621): heads of key_dim 256, value and GLU
# widths near 5/3 of model_dim, so that a layer has 12 model_dim^2 parameters; "xl", "3b" and "7b" are
# the 1.3B, 2.7B and 6.7B of the paper, table 2.
# 391m: Qin et al. 2024 (arXiv:2405.17381) compare TransNormerLLM-385M with a RetNet of 391M whose
# shape they do not print. Ours is the paper's layer (value width 2 d, a two-layer GELU network) at
# the width and depth of TransNormerLLM-385M, with the inner width that gives 391M parameters.
SIZES = {
    "base": _Size(6, 512, 2, 864, 864),
    "medium": _Size(16, 1024, 4, 1728, 1728),
    "xl": _Size(24, 2048, 8, 3456, 3456),
    "3b": _Size(32, 2560, 10, 4280, 4280),
    "7b": _Size(32, 4096, 16, 6912, 6912),
    "13b": _Size(40, 5120, 20, 8560, 8560),
    "65b": _Size(64, 8192, 32, 13_824, 13_824),
    "391m": _Size(24, 1024, 4, 2048, 2816, glu=False),
}
_VOCAB_SIZE = 50_272


def retnet(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """RetNet of a published size: RMSNorm before retention and channel mixer, a shared embedding.

    Args:
        size: "base", "medium", "xl", "3b", "7b", "13b", "65b" or "391m".
        vocab_size: None is 50,272, the vocabulary of the comparison; torchscale leaves it to the
            data.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    norm = NormConfig(kind="rms")
    if row.glu:
        channel_mixer = GluConfig(hidden_dim=row.hidden_dim, activation="silu")
    else:
        channel_mixer = FfnConfig(hidden_dim=row.hidden_dim, activation="gelu")
    block = BlockConfig(
        norm=norm,
        token_mixer=RetentionConfig(heads=row.heads, value_width=row.value_width),
        channel_mixer=channel_mixer,
    )
    return DecoderConfig(
        vocab_size=_VOCAB_SIZE if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        blocks=(block,) * row.num_layers,
        final_norm=norm,
    )
