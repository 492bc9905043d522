"""TransNormer T1 and T2: attention inside blocks first, linear attention with a norm after it."""

from typing import Literal, NamedTuple

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import DiagAttentionConfig, LightningConfig

Variant = Literal["t1", "t2"]

# SRMSNorm in the form of the released code, x / (rms + 1e-8).
NORM = NormConfig(eps=1e-8, eps_outside=True)


class _Size(NamedTuple):
    variant: Variant
    num_layers: int
    model_dim: int
    heads: int
    glu_dim: int
    vocab_size: int
    bias: bool = True
    causal: bool = True
    block_shape: tuple[int, ...] | None = None


# Qin et al. 2022, arXiv:2210.10340: "base" is the language model of WikiText-103, whose 44.64 M
# parameters (Qin et al. 2024, arXiv:2405.17381, table of WikiText-103) are these widths with the
# 50,265 tokens of the GPT-2 BPE; "encoder" is the bidirectional model in RoBERTa's shape. The GLU
# is int(8 d / 3) wide. "379m" is the comparison of arXiv:2405.17381 at 385 M, which prints nothing
# but the parameters: here the depth, width and heads of TransNormerLLM-385M, and the GLU of 3 d
# that gives 379 M with its vocabulary of 50,272, as it does for its row without a gate. "vit-tiny"
# and "vit-small" are the depth, widths and blocks of the paper's models of images; heads of 64
# channels and 1,024 codes are ours.
SIZES: dict[str, _Size] = {
    f"{variant}-{name}": size._replace(variant=variant)
    for name, size in {
        "base": _Size("t1", 6, 512, 8, 1365, 50_265),
        "379m": _Size("t1", 24, 1024, 8, 3072, 50_272, bias=False),
        "encoder": _Size("t1", 12, 768, 12, 2048, 50_265, causal=False),
        "vit-tiny": _Size("t1", 12, 192, 3, 512, 1024, causal=False, block_shape=(4, 4)),
        "vit-small": _Size("t1", 12, 384, 6, 1024, 1024, causal=False, block_shape=(4, 4)),
    }.items()
    for variant in ("t1", "t2")
}


def norm_attention(
    variant: Variant, heads: int, *, bias: bool = True, axes: int = 1
) -> LightningConfig:
    """NormAttention: O = norm(phi(Q) (phi(K)^T V)) without denominator, decay or gate.

    phi is elu (T1) or 1 + elu (T2), LRPE in its rotary form comes after it, and the norm is over
    the merged heads (Qin et al. 2022, arXiv:2210.10340, section 4.1). Its gradient is bounded, and
    that of linear attention divided by its sum of weights is not. With several axes LRPE turns by
    the coordinates of a grid.
    """
    return LightningConfig(
        heads=heads,
        lrpe=True,
        lrpe_form="rotary",
        lrpe_axes=axes,
        decay="none",
        gate="none",
        qk_activation="elu" if variant == "t1" else "1+elu",
        norm=NORM,
        bias=bias,
    )


def diag_attention(
    variant: Variant,
    heads: int,
    *,
    block_size: int = 64,
    block_shape: tuple[int, ...] | None = None,
    bias: bool = True,
) -> DiagAttentionConfig:
    """DiagAttention: relu weights and a norm (T1), or softmax without one (T2)."""
    return DiagAttentionConfig(
        heads=heads,
        block_size=block_size,
        block_shape=block_shape,
        weights="relu" if variant == "t1" else "softmax",
        norm=NORM if variant == "t1" else None,
        bias=bias,
    )


def transnormer_custom(
    *,
    variant: Variant,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    heads: int,
    glu_dim: int,
    block_size: int = 64,
    block_shape: tuple[int, ...] | None = None,
    layout: Literal["halves", "every_layer"] = "halves",
    bias: bool = True,
    causal: bool = True,
) -> DecoderConfig:
    """TransNormer of any size.

    Two things differ from the released code: it also normalises the embedding, for which the
    embedding's scale of sqrt(model_dim) stands here, and its q, k, v start from a Xavier
    distribution; here all projections start from N(0, init_std^2).

    Args:
        variant: "t1" (relu and elu) or "t2" (softmax and 1 + elu).
        vocab_size, model_dim, num_layers, heads, glu_dim: sizes.
        block_size: tokens of a block of DiagAttention.
        block_shape: extents of a block of DiagAttention, one an axis, for a model of grids
            (causal=False): then ``Decoder.forward`` takes the grid's extents as ``shape``, and LRPE
            turns by coordinates in all layers. What the model reads are tokens, pixels or codes as
            ids; patches of images that a projection embeds are not part of it.
        layout: "halves": the first num_layers // 2 layers have DiagAttention, the others
            NormAttention (the paper); "every_layer": each layer is DiagAttention, then
            NormAttention, then the GLU (the released configurations for Long Range Arena), which
            are two blocks.
        bias: of all projections.
        causal: False is the bidirectional model.

    Raises:
        ValueError: sizes that do not fit each other, block_shape in a causal model.
    """
    if block_shape is not None and causal:
        raise ValueError(f"block_shape is {block_shape}; expected None unless causal is False")
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if heads < 1 or model_dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of model_dim, which is {model_dim}")
    if variant not in ("t1", "t2"):
        raise ValueError(f"variant is {variant!r}; expected 't1' or 't2'")
    near = diag_attention(variant, heads, block_size=block_size, block_shape=block_shape, bias=bias)
    far = norm_attention(variant, heads, bias=bias, axes=len(block_shape or (block_size,)))
    glu = GluConfig(hidden_dim=glu_dim, activation="silu", bias=bias)
    if layout == "halves":
        mixers = [near] * (num_layers // 2) + [far] * (num_layers - num_layers // 2)
        blocks = [BlockConfig(norm=NORM, token_mixer=x, channel_mixer=glu) for x in mixers]
    elif layout == "every_layer":
        blocks = [
            BlockConfig(norm=NORM, token_mixer=near, channel_mixer=None),
            BlockConfig(norm=NORM, token_mixer=far, channel_mixer=glu),
        ] * num_layers
    else:
        raise ValueError(f"layout is {layout!r}; expected 'halves' or 'every_layer'")
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        blocks=tuple(blocks),
        final_norm=NORM,
        causal=causal,
    )


def transnormer(size: str, vocab_size: int | None = None) -> DecoderConfig:
    """TransNormer of a published size.

    "vit-tiny" and "vit-small" are the layout of the paper's models of images, six layers of
    DiagAttention in blocks of 4 x 4 and six of NormAttention with LRPE of two axes: call them with
    ``shape=(rows, columns)``. They read grids of tokens, pixels or codes as ids. The embedding of
    patches of an image, the learned absolute positions that the paper adds to it, and the pooling
    for a class are not part of them.

    Args:
        size: "t1-" or "t2-" and "base", "379m", "encoder", "vit-tiny" or "vit-small".
        vocab_size: None is the published vocabulary (50,265; 379m: 50,272), or 1,024 codes for vit.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    return transnormer_custom(
        variant=row.variant,
        vocab_size=row.vocab_size if vocab_size is None else vocab_size,
        model_dim=row.model_dim,
        num_layers=row.num_layers,
        heads=row.heads,
        glu_dim=row.glu_dim,
        bias=row.bias,
        causal=row.causal,
        block_shape=row.block_shape,
    )
