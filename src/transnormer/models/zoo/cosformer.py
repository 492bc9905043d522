"""cosFormer as the language models that its authors compare with on WikiText-103."""

from typing import NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import CosformerConfig


class _Size(NamedTuple):
    num_layers: int
    out_proj: bool


# The authors' fairseq code, architectures cosformer_lm_base_h1 and cosformer_lm_base_h1_l7: width
# 512, one head, a feed-forward network of 2048. With the vocabulary of GPT-2's tokenizer there the
# first has the 44.65 M parameters of Qin et al. 2024, arXiv:2405.17381, table of WikiText-103.
SIZES = {"45m": _Size(6, True), "46m": _Size(7, False)}


def cosformer(size: str, vocab_size: int = 50_265, *, max_positions: int = 512) -> DecoderConfig:
    """cosFormer of a published size, without the sinusoidal positions of that code.

    Args:
        size: "45m", or "46m", which has one layer more and no output projection.
        vocab_size: rows of the embedding, which is the head too.
        max_positions: no longer sequence can be read; the weights depend on it.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    norm = NormConfig(kind="layer", eps=1e-5)
    block = BlockConfig(
        norm=norm,
        token_mixer=CosformerConfig(heads=1, max_positions=max_positions, out_proj=row.out_proj),
        channel_mixer=FfnConfig(hidden_dim=2048, activation="relu", bias=True),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=512,
        blocks=(block,) * row.num_layers,
        final_norm=norm,
    )
