"""cosFormer2 in the sizes of the scaling laws of linear attention."""

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.scaling import SCALING_VOCAB_SIZE, scaling_size
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig, TpeConfig


def cosformer2_custom(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    heads: int,
    glu_dim: int,
) -> DecoderConfig:
    """cosFormer2 of any size (Shen et al. 2024, arXiv:2406.16690, section 2).

    A Toeplitz position encoding after the embedding, with as many exponentials as a head has
    channels; then num_layers layers of lightning attention without decay, with LRPE of all channels
    in every one (public code of the authors leaves the slower half alone: lrpe_init "half") and a
    sigmoid gate through head_dim.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if heads < 1 or model_dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}")
    first = BlockConfig(
        norm=None, token_mixer=TpeConfig(exponents=model_dim // heads), channel_mixer=None
    )
    mixer = LightningConfig(
        heads=heads,
        lrpe=True,
        lrpe_init="head",
        decay="none",
        gate="low_rank",
        gate_activation="sigmoid",
    )
    block = BlockConfig(token_mixer=mixer, channel_mixer=GluConfig(hidden_dim=glu_dim))
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=(first, *(block,) * num_layers),
        embedding_scale=False,
    )


def cosformer2(size: str, vocab_size: int = SCALING_VOCAB_SIZE) -> DecoderConfig:
    """cosFormer2 of a published size, with the vocabulary of the paper.

    Args:
        size: "70m", "160m", "410m", "1b", "3b" or "7b".
        vocab_size: rows of the embedding, which is the head too.

    Raises:
        ValueError: an unknown size.
    """
    return cosformer2_custom(vocab_size=vocab_size, **scaling_size(size)._asdict())
