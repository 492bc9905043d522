"""cosFormer's language models: the published parameter count."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder


def count(size: str) -> int:
    with torch.device("meta"):
        return Decoder(zoo.get(f"cosformer-{size}")).num_parameters()


def test_published_count() -> None:
    # Qin et al. 2024, arXiv:2405.17381, table of WikiText-103: 44.65 M.
    assert round(count("45m") / 1e6, 2) == 44.65


def test_seven_layers_have_no_output_projection() -> None:
    # One layer more, 512 x 512 + 512 less in each.
    layer = (count("45m") - 50_265 * 512 - 2 * 512) // 6
    out = 512 * 512 + 512
    assert count("46m") == 50_265 * 512 + 2 * 512 + 7 * (layer - out)


def test_the_maximum_is_a_choice() -> None:
    config = zoo.cosformer("45m", max_positions=2048)
    assert {block.token_mixer.max_positions for block in config.blocks} == {2048}
    assert zoo.cosformer("45m").blocks[0].token_mixer.max_positions == 512


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size is '1b'; expected one of 45m, 46m"):
        zoo.cosformer("1b")
