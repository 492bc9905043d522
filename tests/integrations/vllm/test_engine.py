"""vLLM, run on the CPU: its greedy tokens are ours, however it schedules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from vllm_cases import Request, mixed_requests, prompt

import transnormer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

Engine = Callable[..., dict[str, Any]]
# A step reads at most 256 tokens of at most 3 requests: long prompts are cut, requests queue, and
# prompts are read in the same steps as others decode.
SCHEDULE = {"max_num_seqs": 3, "max_num_batched_tokens": 256}


def check(model: Path, requests: list[Request], answer: dict[str, Any], turn: int) -> None:
    """Compare a round with ``transnormer.generate`` and the logits of the whole text."""
    decoder = transnormer.load(model)
    for (ids, count), tokens, logprobs in zip(
        requests, answer["tokens"][turn], answer["logprobs"][turn], strict=True
    ):
        ours = transnormer.generate(
            decoder, torch.tensor([ids]), max_new_tokens=count, temperature=0.0, stop=[]
        )
        for _ in ours:
            pass
        assert tokens == ours.token_ids[0]
        with torch.no_grad():
            logits = decoder(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        error = (torch.tensor(logprobs) - exact).abs().max() / logits.std()
        assert error <= tolerances.VLLM_LOGPROB


@pytest.mark.parametrize("layout", ["hf", "released"])
def test_continuous_batches_and_cut_prompts_give_our_tokens(
    toy: Path, engine: Engine, layout: str
) -> None:
    requests = mixed_requests()
    answer = engine(toy / layout, [requests], enable_prefix_caching=False, **SCHEDULE)
    check(toy / layout, requests, answer, 0)


def test_cached_prefixes_give_our_tokens(toy: Path, engine: Engine) -> None:
    first = mixed_requests()
    read = first[0][0]
    again = [(read + prompt(50, 100), 8), (prompt(1, 101), 8), (read, 8)]
    options = {"enable_prefix_caching": True, "block_size": 16}
    answer = engine(toy / "hf", [first, again], **options, **SCHEDULE)
    # 288 is the last end of a block of 16 within the 300 tokens.
    assert answer["cached"] == [[0] * len(first), [288, 0, 288]]
    check(toy / "hf", first, answer, 0)
    check(toy / "hf", again, answer, 1)


@pytest.mark.parametrize("name", ["toy", "switched"])
def test_two_ranks_give_our_tokens(
    request: pytest.FixtureRequest, engine: Engine, name: str
) -> None:
    model, first = request.getfixturevalue(name) / "hf", mixed_requests()
    again = [(first[0][0] + prompt(50, 100), 8), (prompt(1, 101), 8)]
    options = {"enable_prefix_caching": True, "block_size": 16, "tensor_parallel_size": 2}
    answer = engine(model, [first, again], **options, **SCHEDULE)
    assert answer["cached"][1] == [288, 0]
    check(model, first, answer, 0)
    check(model, again, answer, 1)
