"""Expand-oscillate-shrink models: the recall task's, and language models of the grid."""

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import EosConfig

NORM = NormConfig(kind="layer", eps=1e-5)

# Qin et al. 2024, arXiv:2405.17383: widths of the recall models; vocabulary 8192, memories of 64
# rows, two layers.
SIZES = {"mqar-32": 32, "mqar-64": 64, "mqar-128": 128, "mqar-256": 256}


def eos_custom(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    mixer: EosConfig,
    glu_dim: int | None = None,
    max_positions: int = 0,
) -> DecoderConfig:
    """A model of any arm of the grid and any size.

    Args:
        vocab_size, model_dim, num_layers: sizes.
        mixer: the arm, the same in all layers.
        glu_dim: hidden width of the channel mixers; None leaves them out.
        max_positions: learned absolute positions up to this one; 0 has none.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if model_dim % mixer.heads:
        raise ValueError(
            f"heads is {mixer.heads}; expected a divisor of model_dim, which is {model_dim}"
        )
    channel_mixer = None if glu_dim is None else GluConfig(hidden_dim=glu_dim)
    block = BlockConfig(norm=NORM, token_mixer=mixer, channel_mixer=channel_mixer)
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=(block,) * num_layers,
        final_norm=NORM,
        embedding_scale=False,
        max_positions=max_positions,
    )


def eos(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """The model of the recall task: two layers without channel mixers, key-wise data-driven decay.

    Args:
        size: "mqar-32", "mqar-64", "mqar-128" or "mqar-256", by width.
        vocab_size: None is the task's 8192.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    return eos_custom(
        vocab_size=8192 if vocab_size is None else vocab_size,
        model_dim=SIZES[size],
        num_layers=2,
        mixer=EosConfig(),
    )
