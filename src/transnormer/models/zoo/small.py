"""One size of every model of the family, to be compared on the same data: 30 M parameters beside
the embedding, width 512. The sizes are ours; everything else is the family's own."""

from collections.abc import Callable

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.zoo.cosformer2 import cosformer2_custom
from transnormer.models.zoo.flash import flash_custom
from transnormer.models.zoo.hgrn2 import hgrn1, hgrn2
from transnormer.models.zoo.hybrid import hybrid_custom
from transnormer.models.zoo.lightnet import lightnet_custom
from transnormer.models.zoo.llama import llama_custom
from transnormer.models.zoo.retnet import retnet
from transnormer.models.zoo.tnl import tnl_custom
from transnormer.models.zoo.transnormer import Variant, transnormer_custom
from transnormer.nn.channel_mixers import FfnConfig, GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import CosformerConfig, LightningConfig, SoftmaxConfig

_DIM, _LAYERS, _HEADS = 512, 10, 4
_VOCAB_SIZE = 32_768
# What the models with a horizon of their own (cosFormer, FLASH-quad) are built for.
_HORIZON = 1024


def _sized(config: DecoderConfig, glu_dim: int) -> DecoderConfig:
    """Ten of a model's own blocks with another width of their channel mixer."""
    block = config.blocks[-1]
    mixer = block.channel_mixer
    assert isinstance(mixer, FfnConfig | GluConfig)
    widened = mixer.model_copy(update={"hidden_dim": glu_dim})
    block = block.model_copy(update={"channel_mixer": widened})
    return config.model_copy(update={"blocks": (block,) * _LAYERS})


def _cosformer(vocab_size: int) -> DecoderConfig:
    # The published one has one head of 512 channels; this has eight, whose features are 128.
    norm = NormConfig(kind="layer", eps=1e-5)
    block = BlockConfig(
        norm=norm,
        token_mixer=CosformerConfig(heads=8, max_positions=_HORIZON),
        channel_mixer=FfnConfig(hidden_dim=1920, activation="relu", bias=True),
    )
    return DecoderConfig(
        vocab_size=vocab_size, model_dim=_DIM, blocks=(block,) * _LAYERS, final_norm=norm
    )


def _hybrid(vocab_size: int) -> DecoderConfig:
    lightning = LightningConfig(
        heads=_HEADS, v_activation="silu", gate_activation="sigmoid", norm=NormConfig(kind="rms")
    )
    return hybrid_custom(
        vocab_size=vocab_size,
        model_dim=_DIM,
        num_layers=_LAYERS,
        glu_dim=1120,
        pattern=(*[lightning] * 7, SoftmaxConfig(heads=_HEADS)),
    )


def _transnormer(variant: Variant) -> Callable[[int], DecoderConfig]:
    return lambda vocab_size: transnormer_custom(
        variant=variant,
        vocab_size=vocab_size,
        model_dim=_DIM,
        num_layers=_LAYERS,
        heads=8,
        glu_dim=1280,
    )


def _common(vocab_size: int, glu_dim: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "model_dim": _DIM,
        "num_layers": _LAYERS,
        "heads": _HEADS,
        "glu_dim": glu_dim,
    }


# FLASH has no channel mixer: more layers make up for it.
SIZES: dict[str, Callable[[int], DecoderConfig]] = {
    "cosformer": _cosformer,
    "cosformer2": lambda vocab_size: cosformer2_custom(**_common(vocab_size, 1184)),
    "flash": lambda vocab_size: flash_custom(
        form="linear", vocab_size=vocab_size, model_dim=_DIM, num_layers=18
    ),
    "flash-quad": lambda vocab_size: flash_custom(
        form="quad", vocab_size=vocab_size, model_dim=_DIM, num_layers=18, divisor=_HORIZON
    ),
    "hgrn1": lambda vocab_size: _sized(hgrn1("160m", vocab_size), 768).model_copy(
        update={"model_dim": _DIM}
    ),
    "hgrn2": lambda vocab_size: _sized(hgrn2("70m", vocab_size), 1280),
    "hybrid": _hybrid,
    "lightnet": lambda vocab_size: lightnet_custom(**_common(vocab_size, 1184)),
    "llama": lambda vocab_size: llama_custom(**_common(vocab_size, 1280), tie_embeddings=True),
    "retnet": lambda vocab_size: _sized(retnet("base", vocab_size), 752),
    "t1": _transnormer("t1"),
    "t2": _transnormer("t2"),
    "tnl": lambda vocab_size: tnl_custom(**_common(vocab_size, 1104)),
}


def small(size: str, vocab_size: int = _VOCAB_SIZE) -> DecoderConfig:
    """A model of the family with 30 M parameters beside the embedding.

    Args:
        size: which model, for example "tnl" or "llama"; see ``SIZES``.
        vocab_size: rows of the embedding, which is the head too.

    Raises:
        ValueError: an unknown model.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    return SIZES[size](vocab_size)
