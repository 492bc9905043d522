"""Prompt lookup: what it proposes, and that engines with it say the same in fewer steps."""

import pytest
import torch
from decoder_cases import make_ids, make_model
from engine_cases import GREEDY, alone, assert_all_alone, engine_of

from transnormer.infer.lookup import PromptLookup
from transnormer.infer.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ([], 3, []),
        ([1, 2, 3], 3, []),
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 7, [9, 1, 2, 3]),
        # The longest end that was seen before decides, then the last place where it was.
        ([5, 2, 3, 7, 1, 2, 3, 8, 4, 2, 3, 6, 1, 2, 3], 1, [8]),
        ([3, 7, 4, 3, 8, 5, 3], 1, [8]),
        ([4, 4], 2, [4]),
        ([4, 4, 4, 4], 2, [4]),
    ],
)
def test_proposals_are_what_followed_last(text: list[int], count: int, expected: list[int]) -> None:
    assert PromptLookup(text).propose(count) == expected


@pytest.mark.parametrize("ring", [None, 16], ids=["snapshot", "ring"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.2},
    ],
    ids=["greedy", "penalties", "sampled"],
)
def test_drafts_change_no_token_and_save_steps(
    ring: int | None, sampling: dict[str, float]
) -> None:
    model = make_model()
    # Texts that come back to what they said, so that drafts are often right.
    prompts = [make_ids(1, 7, seed=seed)[0].repeat(4) for seed in range(4)]
    steps = {}
    for width in (0, 5):
        engine = engine_of(model, ring=ring, draft_tokens=width, prefill_tokens=60)
        requests = [
            engine.submit(p, max_new_tokens=30, sampling=SamplingConfig(**sampling), seed=3)
            for p in prompts
        ]
        engine.run()
        steps[width] = (engine.steps, [request.token_ids for request in requests])
    assert steps[5][1] == steps[0][1]
    assert "presence_penalty" in sampling or steps[5][0] < 0.8 * steps[0][0]


def test_an_answer_may_end_within_a_draft() -> None:
    model = make_model()
    prompt = make_ids(1, 7)[0].repeat(4)
    free = alone(model, prompt, 30, temperature=0.0)
    for ring in (None, 16):
        engine = engine_of(model, ring=ring, draft_tokens=7, prefill_tokens=60)
        for count in (1, 2, 3, 19):
            request = engine.submit(prompt, max_new_tokens=count, sampling=GREEDY, keep_state=True)
            assert request.result() == free[:count]
            assert request.state.positions.item() == len(prompt) + count
        for size in (9, 12, 14, 17, 20):
            ended = engine.submit(
                prompt,
                max_new_tokens=30,
                sampling=GREEDY,
                until=lambda ids, size=size: len(ids) == size,
            )
            assert ended.result() == free[:size]
        request = engine.submit(
            prompt, max_new_tokens=30, sampling=GREEDY, stop=free[12], keep_state=True
        )
        assert request.result() == free[: free.index(free[12]) + 1]
        end = torch.cat([prompt, torch.tensor(request.token_ids)])
        again = engine.submit(end[-1:], max_new_tokens=4, sampling=GREEDY, state=request.state)
        assert_all_alone(model, [torch.cat([end, end[-1:]])], [again])
