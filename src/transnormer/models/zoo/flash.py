"""FLASH: gated attention units alone, the baseline of the TransNormer papers."""

from typing import Literal, NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import GauConfig

# ScaleNorm with the epsilon of the released code.
NORM = NormConfig(kind="scale", eps=1e-5)


class _Size(NamedTuple):
    form: Literal["linear", "quad"]
    num_layers: int
    model_dim: int
    key_dim: int
    vocab_size: int


# The WikiText-103 models of Qin et al. 2024, arXiv:2405.17381: 42.17 M parameters for the linear
# form with the 50,265 tokens of the GPT-2 BPE. The released code holds a table of 1023 biases and
# two vectors for another bias in every layer, of which its chunks of 64 read 127; ours has the 64
# that causal chunks need, so 42.16 M.
SIZES = {
    "base": _Size("linear", 10, 512, 128, 50_265),
    "quad-base": _Size("quad", 10, 512, 128, 50_265),
}


def flash_custom(
    *,
    form: Literal["linear", "quad"],
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    key_dim: int = 128,
    expansion: int = 2,
    chunk_size: int = 64,
    divisor: int | None = None,
    causal: bool = True,
) -> DecoderConfig:
    """FLASH of any size: ScaleNorm and a gated attention unit in every block, nothing else.

    Args:
        form: "linear" (FLASH) or "quad" (FLASH-quad).
        vocab_size, model_dim, num_layers: sizes.
        key_dim: width of queries and keys.
        expansion: width of the unit, as a multiple of model_dim.
        chunk_size: of the linear form.
        divisor: of the scores, see ``GauConfig``; give the training length to the quadratic form.
        causal: False is the bidirectional model.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    mixer = GauConfig(
        form=form,
        hidden_dim=expansion * model_dim,
        key_dim=key_dim,
        chunk_size=chunk_size,
        divisor=divisor,
    )
    block = BlockConfig(norm=NORM, token_mixer=mixer, channel_mixer=None)
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=(block,) * num_layers,
        final_norm=NORM,
        causal=causal,
    )


def flash(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """FLASH of a published size.

    Args:
        size: "base" (linear) or "quad-base".
        vocab_size: None is the published vocabulary (50,265).

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    return flash_custom(
        form=row.form,
        vocab_size=row.vocab_size if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        key_dim=row.key_dim,
    )
