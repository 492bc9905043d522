"""HGRN2 in the sizes of the scaling laws, and HGRN, its predecessor."""

from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.scaling import SCALING_VOCAB_SIZE, scaling_size
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import Hgrn1Config, Hgrn2Config


class _Size(NamedTuple):
    num_layers: int
    model_dim: int
    glu_dim: int


# Qin et al. 2023, arXiv:2311.04823: the released architecture for WikiText-103, whose GLU has the
# width 2 d. 160m is ours: the depth and width of HGRN2's, and the GLU width that makes up for the
# larger token mixer (7 d^2 instead of 4 d^2), as a baseline of the same size.
HGRN1_SIZES = {"wt103": _Size(6, 512, 1024), "160m": _Size(12, 768, 1280)}
_HGRN1_VOCAB_SIZES = {"wt103": 50_264, "160m": SCALING_VOCAB_SIZE}
_HEAD_DIM = 128


def hgrn2(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """HGRN2 of a published size: SRMSNorm, head dim 128, a GLU without activation, no biases.

    Shen et al. 2024, arXiv:2406.16690, tables 2 and 7.
    Norms, activations and initialisation are the released language model's.

    Args:
        size: "70m", "160m", "410m", "1b", "3b" or "7b".
        vocab_size: None is the published vocabulary, 100,280.

    Raises:
        ValueError: an unknown size.
    """
    row = scaling_size(size, deeper=True)
    block = BlockConfig(
        token_mixer=Hgrn2Config(head_dim=_HEAD_DIM),
        channel_mixer=GluConfig(hidden_dim=row.glu_dim),
    )
    return DecoderConfig(
        vocab_size=SCALING_VOCAB_SIZE if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        blocks=(block,) * row.num_layers,
        embedding_scale=False,
    )


def hgrn1(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """HGRN, the baseline of HGRN2.

    "wt103" is the released architecture for WikiText-103: LayerNorm, biases, embeddings scaled by
    sqrt(model_dim). "160m" has HGRN2's norms and neither, so that the token mixers differ alone.

    Args:
        size: "wt103" or "160m".
        vocab_size: None is GPT-2's in fairseq, 50,264, and 100,280.

    Raises:
        ValueError: an unknown size.
    """
    if size not in HGRN1_SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(HGRN1_SIZES)}")
    row, released = HGRN1_SIZES[size], size == "wt103"
    norm = NormConfig(kind="layer", eps=1e-5) if released else NormConfig()
    block = BlockConfig(
        norm=norm,
        token_mixer=Hgrn1Config(norm=norm, bias=released),
        channel_mixer=GluConfig(hidden_dim=row.glu_dim, bias=released),
    )
    return DecoderConfig(
        vocab_size=_HGRN1_VOCAB_SIZES[size] if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        blocks=(block,) * row.num_layers,
        final_norm=norm,
        embedding_scale=released,
    )
