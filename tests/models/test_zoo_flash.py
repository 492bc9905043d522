"""FLASH's published size and its blocks."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder


def test_parameter_count_of_wikitext_103() -> None:
    with torch.device("meta"):
        model = Decoder(zoo.flash("base"))
    # Each layer of the released code has a bias for 1023 distances and two vectors of the other
    # form; a causal chunk reads 64 entries of all that.
    released = model.num_parameters() + 10 * (1023 + 2 * 128 - 64)
    assert round(released / 1e6, 2) == 42.17


def test_blocks_are_units_alone() -> None:
    for form in ("linear", "quad"):
        config = zoo.flash_custom(form=form, vocab_size=50, model_dim=16, num_layers=3)
        assert {block.channel_mixer for block in config.blocks} == {None}
        assert {block.token_mixer.form for block in config.blocks} == {form}
        assert {block.norm.kind for block in config.blocks} == {"scale"}


@pytest.mark.parametrize("form", ["linear", "quad"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_small_models_train(form: str, causal: bool) -> None:
    config = zoo.flash_custom(
        form=form, vocab_size=50, model_dim=16, num_layers=2, key_dim=8, chunk_size=4, causal=causal
    )
    model = Decoder(config)
    ids = torch.randint(50, (2, 11))
    model.loss(ids, ids).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in model.parameters())


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size is 'large'.*base"):
        zoo.flash("large")
    with pytest.raises(ValueError, match=r"num_layers is 0"):
        zoo.flash_custom(form="quad", vocab_size=50, model_dim=16, num_layers=0)
    assert zoo.get("flash-quad-base", vocab_size=99) == zoo.flash("quad-base", 99)
