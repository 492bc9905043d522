"""Every name of the zoo is a model and says where it comes from; sizes have tests by family."""

import inspect
import re

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig


def build(config: DecoderConfig) -> Decoder:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("name", zoo.names())
def test_every_name_is_a_model(name: str) -> None:
    config = zoo.get(name, vocab_size=512)
    assert DecoderConfig.model_validate_json(config.model_dump_json()) == config
    assert config.vocab_size == 512
    published = zoo.get(name)
    assert published.vocab_size > 512
    assert published.model_copy(update={"vocab_size": 512}) == config
    model = build(config)
    assert model.num_parameters(embeddings=False) > 10 * config.model_dim
    if config.causal:
        assert len(model.empty_state(1).layers) == len(config.blocks)


@pytest.mark.parametrize("name", zoo.names())
def test_a_vocabulary_without_tokens_is_no_default(name: str) -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        zoo.get(name, vocab_size=0)


@pytest.mark.parametrize("family", sorted({name.partition("-")[0] for name in zoo.names()}))
def test_every_family_names_its_source(family: str) -> None:
    function = getattr(zoo, family)
    assert inspect.getdoc(function)
    module = inspect.getmodule(function)
    assert module is not None
    text = inspect.getsource(module)
    assert re.search(r"arXiv:\d{4}\.\d{5}|sizes are ours|published nowhere", text), family
