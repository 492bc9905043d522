"""Steps that begin before the host has seen their tokens: nothing of it shows in what is given."""

import random
from typing import Any

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model, tnl_config
from engine_cases import GREEDY, alone, assert_same_tokens, engine_of, prompts_of

from transnormer.infer import slots as slots_module
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.graphs import Arriving
from transnormer.infer.request import Request
from transnormer.infer.sampling import SamplingConfig
from transnormer.models.decoder import BlockConfig, Decoder
from transnormer.nn.token_mixers import SoftmaxConfig


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


def test_a_step_begins_before_its_tokens_are_seen(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, slots=2, run_ahead=True)
    began, seen, decode = [], [], engine.pool.decode
    monkeypatch.setattr(engine.pool, "decode", lambda *a: (began.append(1), decode(*a))[1])

    class Watched(Arriving):
        def read(self) -> list[list[int]]:
            seen.append(len(began))
            return super().read()

    monkeypatch.setattr(slots_module, "Arriving", Watched)
    requests = [engine.submit(p, max_new_tokens=4, sampling=GREEDY) for p in prompts_of((3, 5))]
    engine.run()
    # Of four tokens the first comes from the prompt; the last one is followed by nothing.
    assert seen == [1, 2, 3, 3]
    assert [r.drawn for r in requests] == [4, 4]


def options_of(draws: random.Random) -> dict[str, Any]:
    """A request as it comes: of any length and sampling, with stops or without."""
    kinds = [
        GREEDY,
        GREEDY,
        SamplingConfig(temperature=0.9, top_k=7),
        SamplingConfig(temperature=0.8, repetition_penalty=1.3),
        SamplingConfig(temperature=0.0, presence_penalty=0.4),
    ]
    return {
        "max_new_tokens": draws.choice([0, 1, 2, 7, 20]),
        "sampling": draws.choice(kinds),
        "seed": draws.randrange(1000),
        "stop": [draws.randrange(VOCAB) for _ in range(draws.choice([0, 4, 12]))],
        "keep_state": draws.random() < 0.5,
        "logprobs": draws.choice([None, None, 2]),
    }


def played(model: Decoder, seed: int, **options: Any) -> list[Request]:
    """Requests that come while others run, some of them cancelled."""
    draws = random.Random(seed)
    engine = engine_of(model, slots=3, **options)
    requests: list[Request] = []
    due = [(draws.randrange(12), make_ids(1, draws.randrange(1, 40), seed=i)[0]) for i in range(9)]
    wishes = [options_of(draws) for _ in due]
    cancelled = {draws.randrange(9): draws.randrange(3, 14) for _ in range(2)}
    for step in range(300):
        for (when, prompt), wish in zip(due, wishes, strict=True):
            if when == step:
                requests.append(engine.submit(prompt, **wish))
        for place, when in cancelled.items():
            if when == step and place < len(requests):
                requests[place].cancel()
        if not engine.step() and step > 14:
            break
    return requests


@pytest.mark.parametrize("ring", [None, 16])
@pytest.mark.parametrize("seed", range(6))
def test_what_comes_and_goes_is_the_same(model: Decoder, seed: int, ring: int | None) -> None:
    """Tokens, reasons, log probabilities and states, also of those that end while a step runs."""
    plain = played(model, seed, ring=ring, batch_invariant=True, run_ahead=False)
    ahead = played(model, seed, ring=ring, batch_invariant=True, run_ahead=True)
    assert [r.finish_reason for r in ahead] == [r.finish_reason for r in plain]
    assert [r.token_ids for r in ahead] == [r.token_ids for r in plain]
    assert [r.first_token_at for r in ahead] == [r.first_token_at for r in plain]
    assert [r.logprobs for r in ahead] == [r.logprobs for r in plain]
    kept = 0
    for one, other in zip(plain, ahead, strict=True):
        if not one.keep_state or one.read_tokens < one.prompt_tokens:
            continue
        kept += 1
        assert int(other.state.positions) == int(one.state.positions) == one.position
        for x, y in zip(one.state.layers, other.state.layers, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert kept


def test_steps_are_not_made_in_vain_at_the_end(model: Decoder) -> None:
    """Nobody's last token is read: its number is known before it is."""
    counts = []
    for run_ahead in (False, True):
        engine = engine_of(model, slots=4, run_ahead=run_ahead)
        calls, decode = [], engine.pool.decode

        def counted(*args: Any, decode: Any = decode, calls: list[int] = calls) -> Any:
            calls.append(len(args[1]))
            return decode(*args)

        engine.pool.decode = counted  # ty: ignore
        for prompt, most in zip(prompts_of((3, 4, 5)), (2, 6, 9), strict=True):
            engine.submit(prompt, max_new_tokens=most, sampling=GREEDY)
        engine.run()
        counts.append(calls)
    assert counts[0] == counts[1] == [3, 2, 2, 2, 2, 1, 1, 1]


def test_an_interrupted_step_leaves_nothing_behind(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, slots=2, run_ahead=True)
    prompt, late = prompts_of((4, 6))
    request = engine.submit(prompt, max_new_tokens=9, sampling=GREEDY)
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Arriving, "read", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert request.finish_reason == "error"
    again = engine.submit(late, max_new_tokens=5, sampling=GREEDY)
    assert_same_tokens(model, late, again.result(), alone(model, late, 5, temperature=0.0))


def test_models_and_drafts_that_cannot_are_refused() -> None:
    blocks = (BlockConfig(token_mixer=SoftmaxConfig(heads=2), channel_mixer=None),)
    growing = make_model(tnl_config(blocks=blocks))
    with pytest.raises(NotImplementedError, match=r"run_ahead is True; expected None or False"):
        Engine(growing, EngineConfig(run_ahead=True))
    with pytest.raises(ValueError, match=r"draft_tokens is 4; expected 0 with run_ahead"):
        EngineConfig(run_ahead=True, draft_tokens=4)
