"""Every token mixer runs in the engine, alone and with drafts; softmax layers by their cache."""

import pytest
from decoder_cases import make_ids
from engine_cases import GREEDY, assert_all_alone, engine_of
from nn.mixer_cases import CASES, VOCAB, MixerCase

LENGTHS = (6, 1, 13, 9)


@pytest.mark.parametrize("draft_tokens", [0, 3], ids=["plain", "drafts"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mixer_under_load_says_what_it_says_alone(case: MixerCase, draft_tokens: int) -> None:
    model = case.model()
    prompts = [make_ids(1, length, seed=length)[0] % VOCAB for length in LENGTHS]
    engine = engine_of(model, slots=2, draft_tokens=draft_tokens)
    requests = [engine.submit(p, max_new_tokens=7, sampling=GREEDY) for p in prompts]
    engine.run()
    assert_all_alone(model, prompts, requests)


@pytest.mark.parametrize("name", ["softmax", "softmax-hybrid", "gau-quad", "hgrn2-hybrid"])
def test_a_growing_state_is_batch_invariant_too(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    prompts = [make_ids(1, length, seed=length)[0] % VOCAB for length in LENGTHS]

    def run(chosen: list[int]) -> list[object]:
        engine = engine_of(model, batch_invariant=True)
        requests = [
            engine.submit(prompts[i], max_new_tokens=6, sampling=GREEDY, logprobs=VOCAB)
            for i in chosen
        ]
        engine.run()
        return [request.logprobs for request in requests]

    together = run([0, 1, 2, 3])
    assert [run([i])[0] for i in range(4)] == together
