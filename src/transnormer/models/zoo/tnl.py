"""TransNormerLLM in its published sizes."""

from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.scaling import SCALING_VOCAB_SIZE, scaling_size
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig


class _Size(NamedTuple):
    num_layers: int
    model_dim: int
    heads: int
    glu_dim: int
    vocab_size: int = 64_000


# Qin et al. 2023, arXiv:2307.14995v2, table of model sizes; 15b: the card of TransNormerLLM3-15B
# (42 layers, width 5120, 40 heads, tiktoken vocabulary), whose GLU width is not published: 13,656
# gives its 14.83 B parameters with the 100,280 tokens of Shen et al. 2024, arXiv:2406.16690.
SIZES = {
    "385m": _Size(24, 1024, 8, 2816),
    "1b": _Size(16, 2048, 16, 5632),
    "3b": _Size(32, 2560, 20, 6912),
    "7b": _Size(30, 4096, 32, 11_008),
    "13b": _Size(36, 5120, 40, 13_824),
    "15b": _Size(42, 5120, 40, 13_656, 100_280),
    "65b": _Size(72, 8192, 64, 22_016),
    "175b": _Size(88, 12_288, 96, 32_768),
}


def tnl_custom(
    *, vocab_size: int, model_dim: int, num_layers: int, heads: int, glu_dim: int
) -> DecoderConfig:
    """TransNormerLLM of any size: LRPE and decay in the first layer, decay alone in the others.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if heads < 1 or model_dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}")
    mixer = LightningConfig(heads=heads)
    channel_mixer = GluConfig(hidden_dim=glu_dim)
    blocks = tuple(
        BlockConfig(
            token_mixer=mixer.model_copy(update={"lrpe": layer_index == 0}),
            channel_mixer=channel_mixer,
        )
        for layer_index in range(num_layers)
    )
    return DecoderConfig(vocab_size=vocab_size, model_dim=model_dim, blocks=blocks)


def tnl(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """TransNormerLLM of a published size, with the special ids of the released checkpoints.

    Args:
        size: "385m", "1b", "3b", "7b", "13b", "15b", "65b" or "175b".
        vocab_size: None is the published vocabulary (64,000; 15b: 100,280).

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    config = tnl_custom(
        vocab_size=row.vocab_size if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        heads=row.heads,
        glu_dim=row.glu_dim,
    )
    return config.model_copy(update={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})


def tnl_scaling(size: str, vocab_size: int = SCALING_VOCAB_SIZE) -> DecoderConfig:
    """TNL as the scaling laws of linear attention have it: a sigmoid gate through head_dim.

    Shen et al. 2024, arXiv:2406.16690, section 2; the rest as TransNormerLLM.

    Args:
        size: "70m", "160m", "410m", "1b", "3b" or "7b".
        vocab_size: rows of the embedding, which is the head too.

    Raises:
        ValueError: an unknown size.
    """
    config = tnl_custom(vocab_size=vocab_size, **scaling_size(size)._asdict())
    gate = {"gate": "low_rank", "gate_activation": "sigmoid"}
    blocks = tuple(
        block.model_copy(update={"token_mixer": block.token_mixer.model_copy(update=gate)})
        for block in config.blocks
    )
    return config.model_copy(update={"blocks": blocks})
