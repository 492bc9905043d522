"""LightNet's language models: parameter counts."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder


def build(size: str) -> Decoder:
    with torch.device("meta"):
        return Decoder(zoo.get(f"lightnet-{size}"))


def test_public_default_has_the_count_of_its_source() -> None:
    # flash-linear-attention 0.6.0, LightNetForCausalLM(LightNetConfig()) on meta.
    assert build("1.4b").num_parameters() == 1_376_929_792


@pytest.mark.parametrize(
    ("size", "layers", "dim", "heads", "glu_dim"),
    [
        ("70m", 6, 512, 4, 1536),
        ("160m", 12, 768, 6, 2048),
        ("410m", 25, 1024, 8, 2816),
        ("1b", 32, 1536, 12, 4096),
        ("3b", 35, 2560, 20, 6912),
        ("7b", 32, 4096, 32, 11_008),
    ],
)
def test_count_of_the_scaling_widths(
    size: str, layers: int, dim: int, heads: int, glu_dim: int
) -> None:
    head_dim = dim // heads
    # Projections, gate, GLU, three norms and frequencies a layer.
    layer = 4 * dim**2 + 2 * dim * head_dim + 3 * dim * glu_dim + 4 * dim
    encoding, last_norm = dim * head_dim + head_dim, dim
    exact = layers * layer + encoding + last_norm
    assert build(size).num_parameters(embeddings=False) == exact


def test_positions_come_from_tpe_and_lrpe() -> None:
    first, *blocks = zoo.lightnet("70m", vocab_size=9).blocks
    assert first.token_mixer.kind == "tpe"
    assert {(b.token_mixer.lrpe, b.token_mixer.gate_activation) for b in blocks} == {
        (True, "sigmoid")
    }
    public = zoo.lightnet("1.4b").blocks
    assert {(b.token_mixer.lrpe, b.token_mixer.gate_activation) for b in public} == {
        (False, "silu")
    }


def test_unknown_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size is '2b'; expected one of 1.4b, 70m"):
        zoo.lightnet("2b")
    sizes = {"vocab_size": 9, "model_dim": 16, "num_layers": 1, "heads": 2, "glu_dim": 8}
    for name, value in (("heads", 3), ("num_layers", 0)):
        with pytest.raises(ValueError, match=rf"{name} is {value}"):
            zoo.lightnet_custom(**sizes | {name: value})
