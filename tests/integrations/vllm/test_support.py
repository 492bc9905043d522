"""What the plugin serves and what it refuses; needs no vLLM."""

import pytest
import torch

import transnormer.integrations.vllm
from transnormer import Decoder, zoo
from transnormer.hf import TransnormerDecoderForCausalLM, TransnormerForCausalLM
from transnormer.integrations.vllm.support import check_supported, state_shape

SERVED = [name for name in zoo.names() if name.split("-")[0] in ("tnl", "tnl_scaling")]
REFUSED = [name for name in zoo.names() if name not in SERVED and not name.startswith("small-")]


@pytest.mark.parametrize("name", SERVED)
def test_every_published_size_is_served_on_as_many_ranks_as_divide_its_heads(name: str) -> None:
    config = zoo.get(name)
    check_supported(config)
    check_supported(config, ranks=2)


@pytest.mark.parametrize("row", sorted(zoo.ABLATIONS))
def test_every_ablation_is_served(row: str) -> None:
    check_supported(zoo.ablation(zoo.tnl("385m"), row))


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match="expected") as caught:
        check_supported(zoo.get(name))
    assert "kind is" in str(caught.value) or "causal is" in str(caught.value)


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a divisor of blocks\[0\].token_mixer.heads"):
        check_supported(zoo.tnl("385m"), ranks=3)
    config = zoo.tnl_custom(vocab_size=50, model_dim=64, num_layers=2, heads=4, glu_dim=91)
    with pytest.raises(ValueError, match=r"a divisor of blocks\[0\].channel_mixer.hidden_dim"):
        check_supported(config, ranks=2)


def test_a_norm_with_means_stays_on_one_rank() -> None:
    config = zoo.ablation(zoo.tnl("385m"), "norm_layer")
    with pytest.raises(NotImplementedError, match="only srms and rms"):
        check_supported(config, ranks=2)


def test_states_of_several_sizes_are_refused() -> None:
    config = zoo.tnl_custom(vocab_size=50, model_dim=64, num_layers=2, heads=4, glu_dim=96)
    first, last = config.blocks
    mixer = last.token_mixer.model_copy(update={"heads": 2})
    blocks = (first, last.model_copy(update={"token_mixer": mixer}))
    with pytest.raises(NotImplementedError, match="states of 2 sizes"):
        check_supported(config.model_copy(update={"blocks": blocks}))


def test_two_virtual_states_hold_what_lrpe_doubles() -> None:
    config = zoo.tnl_custom(vocab_size=50, model_dim=64, num_layers=2, heads=4, glu_dim=96)
    state = Decoder(config).empty_state(1, device="meta")
    for index, layer in enumerate(state.layers):
        assert isinstance(layer, torch.Tensor)
        shape = state_shape(config, index)
        assert layer.shape[1:] == (shape.heads, shape.parts * shape.head_dim, shape.head_dim)
    assert [state_shape(config, i, 2)[:2] for i in range(2)] == [(2, 2), (1, 2)]


def test_the_registered_names_are_those_of_the_classes_for_transformers() -> None:
    names = {kind.__name__ for kind in (TransnormerForCausalLM, TransnormerDecoderForCausalLM)}
    assert set(transnormer.integrations.vllm.ARCHITECTURES) == names
