"""TNL and cosFormer2 in the sizes of the scaling laws: published parameter counts."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder

# Shen et al. 2024, arXiv:2406.16690, tables 2 and 7: num_layers, model_dim, heads, glu_dim, and
# non-embedding parameters in millions of TNL and cosFormer2.
PUBLISHED = {
    "70m": (6, 512, 4, 1536, 21.2, 21.3),
    "160m": (12, 768, 6, 2048, 87.3, 87.5),
    "410m": (25, 1024, 8, 2816, 327.7, 328.0),
    "1b": (32, 1536, 12, 4096, 918.6, 919.1),
    "3b": (35, 2560, 20, 6912, 2798.4, 2799.0),
    "7b": (32, 4096, 32, 11_008, 6509.6, 6511.0),
}


def build(name: str) -> Decoder:
    with torch.device("meta"):
        return Decoder(zoo.get(name))


@pytest.mark.parametrize("size", PUBLISHED)
def test_tnl_count(size: str) -> None:
    layers, dim, heads, glu_dim, published, _ = PUBLISHED[size]
    model = build(f"tnl_scaling-{size}")
    # 12 l d^2 + 2 l d^2 / h in the paper, where glu_dim is 8 d / 3; and the frequencies of LRPE.
    exact = layers * (4 * dim**2 + 3 * dim * glu_dim + 2 * dim**2 // heads) + dim
    count = model.num_parameters(embeddings=False)
    assert count == exact
    assert count / 1e6 == pytest.approx(published, rel=0.003)
    assert model.num_parameters() - count == 100_280 * dim


@pytest.mark.parametrize("size", PUBLISHED)
def test_cosformer2_count(size: str) -> None:
    layers, dim, heads, glu_dim, _, published = PUBLISHED[size]
    model = build(f"cosformer2-{size}")
    # The paper's formula: d^2 / h more than TNL. Frequencies and decays are not in it.
    exact = layers * (4 * dim**2 + 3 * dim * glu_dim + 2 * dim**2 // heads) + dim**2 // heads
    count = model.num_parameters(embeddings=False)
    assert count == exact + layers * dim + dim // heads
    assert count / 1e6 == pytest.approx(published, rel=0.003)
    assert model.num_parameters() - count == 100_280 * dim


def test_tnl_has_a_low_rank_sigmoid_gate_and_lrpe_in_the_first_layer() -> None:
    blocks = zoo.tnl_scaling("160m", vocab_size=50).blocks
    assert [block.token_mixer.lrpe for block in blocks] == [True] + [False] * 11
    for mixer in (block.token_mixer for block in blocks):
        assert (mixer.gate, mixer.gate_activation) == ("low_rank", "sigmoid")
        assert (mixer.gate_position, mixer.decay) == ("after_norm", "tnl")


def test_cosformer2_has_lrpe_everywhere_no_decay_and_tpe_first() -> None:
    config = zoo.cosformer2("160m", vocab_size=50)
    first, *blocks = config.blocks
    assert (first.norm, first.channel_mixer) == (None, None)
    assert first.token_mixer.exponents == 128
    for mixer in (block.token_mixer for block in blocks):
        assert (mixer.lrpe, mixer.lrpe_init, mixer.decay) == (True, "head", "none")


def test_unknown_and_impossible_sizes_are_refused() -> None:
    for family in (zoo.tnl_scaling, zoo.cosformer2):
        with pytest.raises(ValueError, match=r"size is '2b'; expected one of 70m"):
            family("2b")
    sizes = {"vocab_size": 9, "model_dim": 16, "num_layers": 1, "heads": 2, "glu_dim": 8}
    for name, value in (("heads", 3), ("num_layers", 0)):
        with pytest.raises(ValueError, match=rf"{name} is {value}"):
            zoo.cosformer2_custom(**sizes | {name: value})
