"""Sizes of HGRN2 and HGRN: the models that are built have the published parameter counts."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig

# Shen et al. 2024 (arXiv:2406.16690), table 7: num_layers, model_dim, heads, non-embedding
# parameters in millions.
PUBLISHED = {
    "70m": (6, 512, 4, 20.5),
    "160m": (12, 768, 6, 84.9),
    "410m": (26, 1024, 8, 334.0),
    "1b": (32, 1536, 12, 906.0),
    "3b": (35, 2560, 20, 2775.5),
    "7b": (32, 4096, 32, 6476.1),
}


def build(config: DecoderConfig) -> Decoder:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_count(size: str) -> None:
    num_layers, dim, heads, published = PUBLISHED[size]
    config = zoo.hgrn2(size)
    model = build(config)
    count = model.num_parameters(embeddings=False)
    assert abs(count / 1e6 - published) <= 0.0501
    glu_dim = config.blocks[0].channel_mixer.hidden_dim
    # The last term, one number a layer and channel, is the lower bounds.
    assert count == num_layers * (4 * dim**2 + 3 * dim * glu_dim + dim)
    if 3 * glu_dim == 8 * dim:
        assert count == 12 * num_layers * dim**2 + num_layers * dim
    assert model.blocks[0].token_mixer.heads == heads
    assert model.num_parameters() == count + 100_280 * dim


def test_hgrn_has_the_parameters_published_for_wikitext103() -> None:
    # Qin et al. 2024 (arXiv:2405.17381), table of WikiText-103: 46.25 M.
    count = build(zoo.hgrn1("wt103")).num_parameters()
    assert abs(count / 1e6 - 46.25) <= 0.005


def test_the_baseline_has_the_size_of_its_successor() -> None:
    baseline, successor = (
        build(config).num_parameters(embeddings=False)
        for config in (zoo.hgrn1("160m"), zoo.hgrn2("160m"))
    )
    assert abs(baseline / successor - 1) < 0.001


def test_names() -> None:
    assert {f"hgrn2-{size}" for size in PUBLISHED} <= set(zoo.names())
    assert {"hgrn1-wt103", "hgrn1-160m"} <= set(zoo.names())
    assert zoo.get("hgrn2-70m", vocab_size=77) == zoo.hgrn2("70m", vocab_size=77)
    assert zoo.get("hgrn1-wt103", vocab_size=77) == zoo.hgrn1("wt103", vocab_size=77)
    for family in (zoo.hgrn1, zoo.hgrn2):
        assert family("160m", vocab_size=77).vocab_size == 77
        with pytest.raises(ValueError, match=r"size.*'2m'.*160m"):
            family("2m")
