"""Reading a stream: memory is flat and positions are exact, however long it is."""

import resource

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model, tnl_config
from tolerances import LRPE_OFFSET, SPLIT_CPU, relative_error
from torch import Tensor

from transnormer.infer.reading import read
from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.nn.state import state_bytes


def test_pieces_of_any_lengths_are_one_text() -> None:
    model = make_model()
    text = make_ids(2, 40)
    logits, state = read(model, text.split([1, 20, 3, 16], dim=1))
    whole = model(text)
    assert relative_error(logits, whole.logits[:, -1]) <= SPLIT_CPU
    assert state.positions.tolist() == [40, 40]
    again, state = read(model, [text[:, :5]], state)
    assert relative_error(again, model(text[:, :5], state=whole.state).logits[:, -1]) <= SPLIT_CPU


def test_no_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces is empty; expected at least one piece"):
        read(make_model(), [])


def test_reading_leaves_the_model_in_its_mode() -> None:
    model = make_model(tnl_config(dropout=0.5))
    exact, _ = read(model, [make_ids(1, 9)])
    model.train()
    logits, state = read(model, [make_ids(1, 9)])
    assert torch.equal(logits, exact)
    assert not state.layers[0].requires_grad
    assert model.training


def forgetful_model() -> Decoder:
    """A model whose fastest heads alone remain: what is 2,000 tokens old counts for nothing."""
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=32, num_layers=2, heads=2, glu_dim=32)
    model = make_model(config.model_copy(update={"init_std": 0.2}))
    for block in model.blocks:
        decay = block.token_mixer.decay
        decay.log_decay = decay.log_decay.clamp(max=-0.05)
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_tokens_in_flat_memory_at_exact_positions() -> None:
    model, total, piece = forgetful_model(), 1_000_000, 4_000
    generator = torch.Generator().manual_seed(5)
    last: list[Tensor] = []
    peaks: list[int] = []

    def pieces() -> object:
        for _ in range(total // piece):
            last[:] = [torch.randint(VOCAB, (1, piece), generator=generator)]
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            yield last[0]

    logits, state = read(model, pieces())
    assert state.positions.tolist() == [total]
    assert sum(map(state_bytes, state.layers)) == 4 * (2 * 32 * 16 + 2 * 16 * 16)
    # Kilobytes: after the first tenth the process never needed more than a few of them.
    assert peaks[-1] - peaks[len(peaks) // 10] <= 8_192
    near, _ = read(model, [last[0]])
    assert relative_error(logits, near) <= LRPE_OFFSET
