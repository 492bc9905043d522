"""The recall models and the grid's language models are built as described."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.nn.token_mixers import EosConfig


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_recall_model_has_two_layers_of_one_memory(dim: int) -> None:
    config = zoo.get(f"eos-mqar-{dim}")
    assert len(config.blocks) == 2
    assert all(block.channel_mixer is None for block in config.blocks)
    with torch.device("meta"):
        model = Decoder(config)
    # i and out, e, s and the decay of 64 rows, a LayerNorm; the block's norm; the last norm.
    layer = 2 * dim**2 + 3 * 64 * dim + 4 * dim
    assert model.num_parameters() == 8192 * dim + 2 * layer + 2 * dim
    state = model.empty_state(3, device="meta")
    assert [x.shape for x in state.layers] == [(3, 1, 64, dim)] * 2


def test_language_model_has_channel_mixers_and_positions_on_request() -> None:
    config = zoo.eos_custom(
        vocab_size=50, model_dim=16, num_layers=3, mixer=EosConfig(heads=2), glu_dim=24
    )
    assert [block.channel_mixer.hidden_dim for block in config.blocks] == [24] * 3
    assert config.max_positions == 0
    placed = zoo.eos_custom(
        vocab_size=50, model_dim=16, num_layers=1, mixer=EosConfig(), max_positions=9
    )
    assert Decoder(placed).position_embedding.weight.shape == (9, 16)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="size is '64'; expected one of mqar-32"):
        zoo.eos("64")
    with pytest.raises(ValueError, match="num_layers is 0"):
        zoo.eos_custom(vocab_size=50, model_dim=16, num_layers=0, mixer=EosConfig())
    with pytest.raises(ValueError, match="heads is 3; expected a divisor of model_dim"):
        zoo.eos_custom(vocab_size=50, model_dim=16, num_layers=1, mixer=EosConfig(heads=3))
