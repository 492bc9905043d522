"""TransNormer's published sizes, its order of layers and its variants."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig

SIZES = {"vocab_size": 50, "model_dim": 16, "num_layers": 5, "heads": 2, "glu_dim": 24}


def count(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return Decoder(config).num_parameters()


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize(
    ("size", "published"), [("base", 44.64), ("379m", 379), ("encoder", 123.63)]
)
def test_parameter_counts(variant: str, size: str, published: float) -> None:
    # 44.64 M and 379 M are printed; the encoder's is RoBERTa's shape with a GLU of 8 d / 3.
    digits = 0 if published == 379 else 2
    assert round(count(zoo.transnormer(f"{variant}-{size}")) / 1e6, digits) == published


def test_base_count_follows_the_formula() -> None:
    d, g, v = 512, 1365, 50_265
    layer = 4 * (d * d + d) + 3 * d * g + 2 * g + d
    theta = 64 // 2
    assert count(zoo.transnormer("t2-base")) == v * d + 6 * (layer + theta)


def test_379m_has_the_shape_of_tnl_385m_and_no_biases() -> None:
    d, g, v = 1024, 3 * 1024, 50_272
    config = zoo.transnormer("t1-379m")
    assert count(config) == v * d + 24 * (4 * d * d + 3 * d * g + 128 // 2)
    assert len(config.blocks) == len(zoo.tnl("385m").blocks)


def test_first_half_is_diag_attention() -> None:
    config = zoo.transnormer_custom(variant="t2", **SIZES)
    kinds = [block.token_mixer.kind for block in config.blocks]
    assert kinds == ["diag_attention"] * 2 + ["lightning"] * 3


def test_every_layer_layout_has_both_and_one_glu() -> None:
    config = zoo.transnormer_custom(variant="t1", layout="every_layer", **SIZES)
    parts = [(b.token_mixer.kind, b.channel_mixer is not None) for b in config.blocks]
    assert parts == [("diag_attention", False), ("lightning", True)] * 5


def test_variants() -> None:
    t1, t2 = (zoo.transnormer(f"{variant}-base").blocks for variant in ("t1", "t2"))
    assert (t1[0].token_mixer.weights, t2[0].token_mixer.weights) == ("relu", "softmax")
    assert t1[0].token_mixer.norm is not None
    assert t2[0].token_mixer.norm is None
    activations = t1[-1].token_mixer.qk_activation, t2[-1].token_mixer.qk_activation
    assert activations == ("elu", "1+elu")
    assert {block.token_mixer.block_size for block in t2[:3]} == {64}


@pytest.mark.parametrize("layout", ["halves", "every_layer"])
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_small_models_train(variant: str, layout: str, causal: bool) -> None:
    config = zoo.transnormer_custom(
        variant=variant, layout=layout, causal=causal, block_size=4, **SIZES
    )
    model = Decoder(config)
    ids = torch.randint(50, (2, 11))
    model.loss(ids, ids).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in model.parameters())


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize(("size", "d"), [("vit-tiny", 192), ("vit-small", 384)])
def test_models_of_grids_have_the_published_layout(size: str, d: int, variant: str) -> None:
    config = zoo.get(f"transnormer-{variant}-{size}")
    assert (config.model_dim, len(config.blocks), config.causal) == (d, 12, False)
    near, far = ([b.token_mixer for b in half] for half in (config.blocks[:6], config.blocks[6:]))
    assert {(x.kind, x.block_shape, x.lrpe) for x in near} == {("diag_attention", (4, 4), True)}
    assert {(x.kind, x.lrpe, x.lrpe_axes) for x in far} == {("lightning", True, 2)}
    g = 8 * d // 3
    # Pairs of a head of 64 channels, halved between two axes.
    theta = 64 // 2 // 2
    layer = 4 * (d * d + d) + 3 * d * g + 2 * g + d + theta
    assert count(config) == 1024 * d + 12 * layer


@pytest.mark.parametrize("layout", ["halves", "every_layer"])
def test_small_models_of_grids_train(layout: str) -> None:
    config = zoo.transnormer_custom(
        variant="t2", layout=layout, causal=False, block_shape=(2, 2), **SIZES
    )
    model = Decoder(config)
    ids = torch.randint(50, (2, 15))
    model.loss(ids, ids, shape=(3, 5)).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in model.parameters())


def test_encoder_is_bidirectional() -> None:
    assert not zoo.transnormer("t1-encoder").causal


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variant": "t3"}, r"variant is 't3'.*'t1' or 't2'"),
        ({"layout": "mixed"}, r"layout is 'mixed'.*'halves'"),
        ({"heads": 3}, r"heads is 3.*divisor of model_dim"),
        ({"num_layers": 0}, r"num_layers is 0"),
        ({"block_shape": (4, 4)}, r"block_shape is \(4, 4\); expected None unless causal is False"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        zoo.transnormer_custom(**({"variant": "t1"} | SIZES | changes))


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size is 't3-base'.*t1-base"):
        zoo.transnormer("t3-base")
    assert zoo.get("transnormer-t1-base", vocab_size=99) == zoo.transnormer("t1-base", 99)
