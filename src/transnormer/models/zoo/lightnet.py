"""LightNet as a language model."""

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.scaling import SCALING_SIZES, SCALING_VOCAB_SIZE, scaling_size
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightNetConfig, TpeConfig

# No table of LightNet's language models is at hand. "1.4b" is the default of its public
# implementation, flash-linear-attention 0.6.0, LightNetConfig; the others are ours: the widths of
# the scaling laws, so that LightNet can stand beside the models that were measured there.
SIZES = ("1.4b", *SCALING_SIZES)


def lightnet_custom(
    *, vocab_size: int, model_dim: int, num_layers: int, heads: int, glu_dim: int
) -> DecoderConfig:
    """LightNet of any size (Qin et al. 2024, arXiv:2405.21022): a Toeplitz position encoding after
    the embedding, then layers with LRPE, a low-rank sigmoid gate and a gated linear unit.

    ``model_copy(update={"causal": False})`` gives the bidirectional model, which reads a sequence
    in one pass. The Toeplitz kernel has as many exponentials as a head has channels: ours.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if heads < 1 or model_dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}")
    norm = NormConfig(kind="rms")
    first = BlockConfig(
        norm=None, token_mixer=TpeConfig(exponents=model_dim // heads), channel_mixer=None
    )
    block = BlockConfig(
        norm=norm,
        token_mixer=LightNetConfig(heads=heads),
        channel_mixer=GluConfig(hidden_dim=glu_dim),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=(first, *(block,) * num_layers),
        final_norm=norm,
        embedding_scale=False,
    )


def _public_default(vocab_size: int) -> DecoderConfig:
    """24 layers of width 2048, key dim 128, gate rank 128, no position encoding."""
    norm = NormConfig(kind="rms")
    mixer = LightNetConfig(heads=16, lrpe=False, gate_rank=128, gate_activation="silu")
    block = BlockConfig(
        norm=norm,
        token_mixer=mixer,
        channel_mixer=GluConfig(hidden_dim=5632, activation="silu"),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=2048,
        blocks=(block,) * 24,
        final_norm=norm,
        embedding_scale=False,
        tie_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def lightnet(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """LightNet as a language model.

    Args:
        size: "1.4b", the default of the public implementation, or one of the scaling laws' widths,
            "70m", "160m", "410m", "1b", "3b" or "7b", which is our choice.
        vocab_size: None is 32,000 for 1.4b, 100,280 for the others.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    if size == "1.4b":
        return _public_default(32_000 if vocab_size is None else vocab_size)
    sizes = scaling_size(size)._asdict()
    vocab_size = SCALING_VOCAB_SIZE if vocab_size is None else vocab_size
    return lightnet_custom(vocab_size=vocab_size, **sizes)
