"""The ablations of the TransNormerLLM paper, as changes of a configuration."""

from collections.abc import Callable

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig, TokenMixerConfig

_Change = Callable[[DecoderConfig], DecoderConfig]


def _mixers(**update: object) -> _Change:
    """Change fields of every token mixer."""

    def change(config: DecoderConfig) -> DecoderConfig:
        return _rebuild(config, lambda block: {"token_mixer": _updated(block.token_mixer, update)})

    return change


def _updated(mixer: TokenMixerConfig, update: dict[str, object]) -> TokenMixerConfig:
    assert isinstance(mixer, LightningConfig)
    return LightningConfig.model_validate({**mixer.model_dump(), **update})


def _rebuild(
    config: DecoderConfig, change: Callable[[BlockConfig], dict[str, object]]
) -> DecoderConfig:
    blocks = tuple(block.model_copy(update=change(block)) for block in config.blocks)
    return config.model_copy(update={"blocks": blocks})


def _channels(**update: object) -> _Change:
    """Change fields of every channel mixer."""

    def changed(block: BlockConfig) -> dict[str, object]:
        assert isinstance(block.channel_mixer, GluConfig)
        fields = {**block.channel_mixer.model_dump(), **update}
        return {"channel_mixer": GluConfig.model_validate(fields)}

    return lambda config: _rebuild(config, changed)


def _norms(kind: str) -> _Change:
    """Change every norm of the model: of the blocks, inside the mixers, and the last."""
    norm = NormConfig.model_validate({"kind": kind})

    def change(config: DecoderConfig) -> DecoderConfig:
        config = _mixers(norm=norm.model_dump())(config)
        config = _rebuild(config, lambda _: {"norm": norm})
        return config.model_copy(update={"final_norm": norm})

    return change


def _absolute_positions(config: DecoderConfig) -> DecoderConfig:
    config = _mixers(lrpe=False, decay="none")(config)
    # 1024 positions are the 1 M parameters that this row has more than the others, at width 1024.
    return config.model_copy(update={"max_positions": 1024})


# Qin et al. 2023, arXiv:2307.14995, tables of ablations at 385 M: row -> change. "no_gate" keeps the
# parameters near by a GLU of width 3 d (the paper's 379 M).
ABLATIONS: dict[str, _Change] = {
    "absolute_positions": _absolute_positions,
    "decay_only": _mixers(lrpe=False),
    "lrpe_only": _mixers(lrpe=True, decay="none"),
    "lrpe_all_layers": _mixers(lrpe=True),
    "no_temperature": _mixers(decay_temperature=False),
    "no_gate": lambda c: _channels(hidden_dim=3 * c.model_dim)(_mixers(gate="none")(c)),
    "qk_none": _mixers(qk_activation="none"),
    "qk_1+elu": _mixers(qk_activation="1+elu"),
    "glu_swish": _channels(activation="silu"),
    "norm_rms": _norms("rms"),
    "norm_layer": _norms("layer"),
    "lightning1": _mixers(implementation="lightning1"),
}


def ablation(config: DecoderConfig, name: str) -> DecoderConfig:
    """A TransNormerLLM configuration with one row of the paper's ablation tables changed.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}; expected one of {', '.join(ABLATIONS)}")
    return ABLATIONS[name](config)
