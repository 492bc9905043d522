"""Published sizes: the models that are built have the published parameter counts."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder

# Qin et al. 2023 (arXiv:2307.14995v2), table of model sizes: num_layers, model_dim, heads, glu_dim,
# parameters. The 385M row exceeds the formula that gives the other six by 36,864.
PUBLISHED = {
    "385m": (24, 1024, 8, 2816, 384_974_848 - 36_864),
    "1b": (16, 2048, 16, 5632, 992_165_888),
    "3b": (32, 2560, 20, 6912, 2_876_006_400),
    "7b": (30, 4096, 32, 11_008, 6_780_547_072),
    "13b": (36, 5120, 40, 13_824, 12_620_195_840),
    "65b": (72, 8192, 64, 22_016, 63_528_009_728),
    "175b": (88, 12_288, 96, 32_768, 173_356_498_944),
}
# Released checkpoints with a vocabulary of 64,000.
RELEASED = {"385m": 398_984_192, "1b": 1_020_266_496, "7b": 6_836_719_616}


def build(size: str, **changes: int) -> Decoder:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return Decoder(zoo.tnl(size, **changes))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_count(size: str) -> None:
    num_layers, model_dim, heads, glu_dim, published = PUBLISHED[size]
    model = build(size, vocab_size=50_272)
    theta = model.blocks[0].token_mixer.lrpe.theta
    assert theta.shape == (heads, 1, model_dim // heads)
    # The table counts pairwise rotations, model_dim / 2 in every layer, instead of this theta.
    count = model.num_parameters() - theta.numel() + num_layers * model_dim // 2
    assert count == published
    per_layer = 5 * model_dim**2 + 3 * model_dim * glu_dim
    assert model.num_parameters(embeddings=False) == num_layers * per_layer + model_dim


@pytest.mark.parametrize("size", RELEASED)
def test_released_count(size: str) -> None:
    assert build(size, vocab_size=64_000).num_parameters() == RELEASED[size]


def test_15b_count() -> None:
    # The card says 14.83 B; its GLU width is not published.
    count = build("15b", vocab_size=100_280).num_parameters()
    assert abs(count - 14.83e9) < 0.005e9


@pytest.mark.parametrize("size", PUBLISHED)
def test_first_layer_alone_has_lrpe_and_every_layer_decays(size: str) -> None:
    blocks = zoo.tnl(size, vocab_size=64_000).blocks
    assert [block.token_mixer.lrpe for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert {block.token_mixer.decay for block in blocks} == {"tnl"}


def test_names_and_get() -> None:
    assert {f"tnl-{size}" for size in (*PUBLISHED, "15b")} <= set(zoo.names())
    assert zoo.get("tnl-1b", vocab_size=777) == zoo.tnl("1b", vocab_size=777)


def test_unknown_name_offers_a_close_one() -> None:
    with pytest.raises(ValueError, match=r"tnl-386m.*tnl-385m"):
        zoo.get("tnl-386m", vocab_size=100)
    with pytest.raises(ValueError, match=r"size.*'2b'.*385m"):
        zoo.tnl("2b", vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": 3}, "heads"),
        ({"heads": 0}, "heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"glu_dim": 0}, "hidden_dim"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], named: str) -> None:
    sizes = {"vocab_size": 10, "model_dim": 16, "num_layers": 1, "heads": 2, "glu_dim": 8}
    with pytest.raises(ValueError, match=named):
        zoo.tnl_custom(**(sizes | changes))
