"""Hybrids of linear and softmax layers: sizes, generation, states of two kinds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import VOCAB, assert_logits_agree, make_ids, make_model
from tolerances import SPLIT_CPU
from torch import Tensor

from transnormer.eval.perplexity import score_tokens
from transnormer.infer.generate import generate
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.state import DecoderState
from transnormer.nn.state import KVState
from transnormer.nn.token_mixers import (
    GauConfig,
    Hgrn2Config,
    LightningConfig,
    SoftmaxConfig,
    TokenMixerConfig,
)

PATTERN = (LightningConfig(heads=2, lrpe=True), SoftmaxConfig(heads=4, kv_heads=2))


def small(pattern: Sequence[TokenMixerConfig] = PATTERN, **changes: Any) -> DecoderConfig:
    """Three layers: linear, softmax, linear."""
    config = zoo.hybrid_custom(
        vocab_size=VOCAB, model_dim=32, num_layers=3, glu_dim=48, pattern=pattern
    )
    return config.model_copy(update={"init_std": 0.2, **changes})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model(small())


def test_every_eighth_layer_of_the_named_size_is_softmax() -> None:
    config = zoo.get("hybrid-410m", vocab_size=777)
    kinds = [block.token_mixer.kind for block in config.blocks]
    assert kinds == [*["lightning"] * 7, "softmax"] * 3
    assert config.vocab_size == 777
    with torch.device("meta"):
        model = Decoder(zoo.hybrid("410m"))
    dim, glu, layers = 1024, 2816, 24
    # Lightning layers have a gate: 5 matrices of dim x dim, and a norm of the merged heads.
    weights = 21 * 5 * dim**2 + 3 * 4 * dim**2 + layers * 3 * dim * glu
    norms = (2 * layers + 1 + 21) * dim
    assert model.num_parameters(embeddings=False) == weights + norms
    # As many as the models of this row of the scaling laws: 328 M to 334 M.
    assert 327e6 < weights < 334.2e6


def test_a_pattern_repeats_along_the_depth() -> None:
    assert [block.token_mixer for block in small().blocks] == [PATTERN[0], PATTERN[1], PATTERN[0]]
    for changes, named in (({"pattern": ()}, "pattern"), ({"num_layers": 0}, "num_layers")):
        sizes = {"vocab_size": 9, "model_dim": 8, "num_layers": 2, "glu_dim": 8, "pattern": PATTERN}
        with pytest.raises(ValueError, match=named):
            zoo.hybrid_custom(**(sizes | changes))
    with pytest.raises(ValueError, match="size is '1b'"):
        zoo.hybrid("1b")


def greedy_by_forward(model: Decoder, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation without any state: the whole text is read anew for each token."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_ragged_prompts_generate_as_alone_and_go_on_from_a_file(
    model: Decoder, tmp_path: Path
) -> None:
    prompts = [make_ids(1, length, seed=length)[0] for length in (5, 1, 70)]
    first = generate(model, prompts, max_new_tokens=5, temperature=0.0)
    list(first)
    for row, prompt in enumerate(prompts):
        assert first.token_ids[row] == greedy_by_forward(model, prompt, 5)
    first.state.save(tmp_path / "state", model)
    state = DecoderState.load(tmp_path / "state", model)
    assert [type(layer) for layer in state.layers] == [torch.Tensor, KVState, torch.Tensor]
    second = generate(model, make_ids(3, 2), max_new_tokens=3, temperature=0.0, state=state)
    list(second)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, torch.tensor(first.token_ids[row]), make_ids(3, 2)[row]])
        assert second.token_ids[row] == greedy_by_forward(model, text, 3)


def test_states_of_two_kinds_are_selected_and_copied(model: Decoder) -> None:
    ids = make_ids(3, 30)
    with torch.no_grad():
        state = model(ids).state
        copy = state.clone()
        copy.layers[0].zero_()
        copy.layers[1].values.zero_()
        chosen = state.select([1, 1, 0])
        more = make_ids(3, 4, seed=9)
        logits = model(more, state=chosen).logits
        exact = model(torch.cat([ids[[1, 1, 0]], more], 1)).logits[:, -4:]
    assert_logits_agree(logits, exact, SPLIT_CPU)


def test_the_model_round_trips_and_scores_in_chunks(model: Decoder, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint()
    documents = [make_ids(1, length, seed=length)[0].tolist() for length in (40, 9)]
    whole = score_tokens(model, documents, first_id=0)
    parts = score_tokens(again, documents, first_id=0, chunk=6)
    assert [x.nats for x in parts] == pytest.approx([x.nats for x in whole], rel=1e-5)


def test_layers_of_a_kind_that_cannot_share_are_refused() -> None:
    pattern = (Hgrn2Config(head_dim=8), SoftmaxConfig(heads=4), Hgrn2Config(head_dim=16))
    Decoder(small(pattern=pattern))
    other = pattern[2].model_copy(update={"lower_bound": "exclusive"})
    message = r"blocks\[2\].*rule=exclusive.*expected.*rule=cumulative.*'hgrn2'"
    with pytest.raises(ValueError, match=message):
        Decoder(small(pattern=(*pattern[:2], other)))


@pytest.mark.parametrize(
    ("mixer", "other", "found", "expected"),
    [
        (SoftmaxConfig(heads=4), LightningConfig(heads=4), "Tensor", "KVState"),
        (LightningConfig(heads=4), SoftmaxConfig(heads=4), "KVState", "Tensor"),
        (GauConfig(form="quad"), GauConfig(), "GauState", "KVState"),
    ],
    ids=["recurrent", "cache", "form"],
)
def test_a_state_of_another_model_is_named(
    mixer: TokenMixerConfig, other: TokenMixerConfig, found: str, expected: str
) -> None:
    state = Decoder(small(pattern=(other,))).empty_state(1)
    with pytest.raises(ValueError, match=rf"layers\[0\] is a {found}; expected a {expected}"):
        Decoder(small(pattern=(mixer,)))(make_ids(1, 2), state=state)
