"""RetNet's sizes: the models that are built have the published parameter counts."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder

# torchscale's architectures: num_layers, model_dim, heads, value width and GLU width.
TORCHSCALE = {
    "base": (6, 512, 2, 864),
    "medium": (16, 1024, 4, 1728),
    "xl": (24, 2048, 8, 3456),
    "3b": (32, 2560, 10, 4280),
    "7b": (32, 4096, 16, 6912),
    "13b": (40, 5120, 20, 8560),
    "65b": (64, 8192, 32, 13_824),
}
# Sun et al. 2023 (arXiv:2307.08621), table 2, which rounds to a tenth of a billion.
NAMED = {"xl": 1.3e9, "3b": 2.7e9, "7b": 6.7e9}


def build(size: str) -> Decoder:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return Decoder(zoo.retnet(size))


@pytest.mark.parametrize("size", TORCHSCALE)
def test_torchscale_count(size: str) -> None:
    num_layers, dim, heads, width = TORCHSCALE[size]
    model = build(size)
    per_layer = 2 * dim**2 + 3 * dim * width + 3 * dim * width + 2 * dim
    assert model.num_parameters(embeddings=False) == num_layers * per_layer + dim
    mixer = model.blocks[0].token_mixer
    assert (mixer.key_dim, mixer.value_dim) == (256, width // heads)
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("size", NAMED)
def test_sizes_are_those_that_the_paper_names(size: str) -> None:
    assert abs(build(size).num_parameters() - NAMED[size]) < 0.05e9


def test_the_size_beside_transnormerllm_has_391m() -> None:
    model = build("391m")
    assert abs(model.num_parameters() - 391e6) < 0.5e6
    dim = 1024
    mixer = sum(p.numel() for p in model.blocks[0].token_mixer.parameters())
    assert mixer == 8 * dim**2
    assert len(model.blocks) == len(zoo.tnl("385m").blocks)


def test_names() -> None:
    assert {f"retnet-{size}" for size in (*TORCHSCALE, "391m")} <= set(zoo.names())
    assert zoo.get("retnet-base", vocab_size=77) == zoo.retnet("base", vocab_size=77)
    assert zoo.retnet("base", vocab_size=77).vocab_size == 77
    with pytest.raises(ValueError, match=r"size.*'1b'.*391m"):
        zoo.retnet("1b")
