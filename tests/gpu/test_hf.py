"""transformers' ``generate`` on a GPU: kernels behind it, and compiled steps with a static cache."""

from typing import Any

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, tnl_config
from hf_cases import PAD, hybrid_config, pair
from tolerances import SPLIT_GPU
from transformers import PreTrainedModel

pytestmark = pytest.mark.gpu
GPU, NEW = "cuda", 8


def generated(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    """Greedy tokens and their logits."""
    return model.generate(
        ids.to(GPU),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("config", [tnl_config(), hybrid_config()], ids=["tnl", "hybrid"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_are_those_of_a_whole_pass_on_a_cpu(config: Any, padded: bool) -> None:
    model, wrapped = pair(config)
    ids = make_ids(3, 70)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    out = generated(wrapped.to(GPU), ids, attention_mask=mask.to(GPU))
    with torch.no_grad():
        exact = model(
            out.sequences[:, :-1].cpu(),
            mask=torch.cat([mask, mask.new_ones(3, NEW - 1)], 1).bool(),
        ).logits[:, -NEW:]
    assert_logits_agree(torch.stack(out.logits, 1).cpu(), exact, SPLIT_GPU)


def test_compiled_steps_with_a_static_cache_give_the_same() -> None:
    _, wrapped = pair(tnl_config())
    wrapped.to(GPU)
    ids = make_ids(3, 40)
    exact = generated(wrapped, ids)
    for _ in range(2):
        found = generated(wrapped, ids, cache_implementation="static")
        assert torch.equal(found.sequences, exact.sequences)
        logits = torch.stack(found.logits, 1).cpu()
        assert_logits_agree(logits, torch.stack(exact.logits, 1).cpu(), SPLIT_GPU)


def test_assisted_decoding_gives_the_same() -> None:
    _, wrapped = pair(tnl_config())
    wrapped.to(GPU)
    ids = make_ids(1, 6).repeat(1, 4)
    exact = generated(wrapped, ids)
    found = generated(wrapped, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(found.sequences, exact.sequences)
