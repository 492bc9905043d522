"""Which decoders the plugin serves, and the size of their states."""

from typing import NamedTuple

from transnormer.models.decoder import DecoderConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig

_ELSEWHERE = "serve this model with `transnormer serve`"


class StateShape(NamedTuple):
    """States of one layer.

    Attributes:
        parts: states of the shape below: 2 where LRPE doubles the keys, else 1.
        heads: on each rank.
        head_dim: keys and values of a part.
    """

    parts: int
    heads: int
    head_dim: int


def check_supported(config: DecoderConfig, ranks: int = 1) -> None:
    """Raise unless vLLM can serve a decoder through this plugin.

    TransNormerLLM in all sizes and ablations is served: blocks of lightning attention with a gated
    unit or a plain feed-forward network.

    Args:
        config: the decoder.
        ranks: of tensor parallelism.

    Raises:
        NotImplementedError: another model of this package, which is named.
        ValueError: heads or widths that do not divide among the ranks.
    """
    if not config.causal:
        raise NotImplementedError("causal is False; expected True: only a causal model generates")
    for index, block in enumerate(config.blocks):
        mixer, where = block.token_mixer, f"blocks[{index}].token_mixer"
        if not isinstance(mixer, LightningConfig):
            raise NotImplementedError(
                f"{where}.kind is {mixer.kind!r}; expected 'lightning' in every block: the vLLM "
                f"plugin serves TransNormerLLM alone; {_ELSEWHERE}"
            )
        if mixer.lrpe and mixer.lrpe_form != "doubled":
            raise NotImplementedError(
                f"{where}.lrpe_form is {mixer.lrpe_form!r}; expected 'doubled', the form of "
                f"TransNormerLLM; {_ELSEWHERE}"
            )
        _check_ranks(config, index, ranks)
    sizes = {state_shape(config, i, ranks)[1:] for i in range(len(config.blocks))}
    if len(sizes) > 1:
        raise NotImplementedError(
            f"blocks have states of {len(sizes)} sizes, (heads, head_dim) in {sorted(sizes)}; "
            f"expected one: vLLM gives the states of all layers pages of one size; {_ELSEWHERE}"
        )


def _check_ranks(config: DecoderConfig, index: int, ranks: int) -> None:
    """Raise unless block ``index`` can be shared among ranks."""
    if ranks == 1:
        return
    block = config.blocks[index]
    mixer, channel = block.token_mixer, block.channel_mixer
    assert isinstance(mixer, LightningConfig)
    counts = {"token_mixer.heads": mixer.heads}
    if channel is not None:
        counts["channel_mixer.hidden_dim"] = channel.hidden_dim
    for name, count in counts.items():
        if count % ranks:
            raise ValueError(
                f"tensor_parallel_size is {ranks}; expected a divisor of blocks[{index}].{name}, "
                f"which is {count}"
            )
    if not is_sharable(mixer.norm):
        raise NotImplementedError(
            f"tensor_parallel_size is {ranks}; expected 1 with blocks[{index}].token_mixer.norm = "
            f"({mixer.norm}): only srms and rms over all heads at once are shared among ranks"
        )


def is_sharable(norm: NormConfig) -> bool:
    """Whether the sum of squares is all that ranks with parts of the channels must exchange."""
    return norm.kind in ("srms", "rms") and norm.groups == 1 and not norm.eps_outside


def state_shape(config: DecoderConfig, index: int, ranks: int = 1) -> StateShape:
    """The states of layer ``index`` on each of the ranks."""
    mixer = config.blocks[index].token_mixer
    assert isinstance(mixer, LightningConfig)
    head_dim = (mixer.hidden_dim or config.model_dim) // mixer.heads
    return StateShape(2 if mixer.lrpe else 1, mixer.heads // ranks, head_dim)
