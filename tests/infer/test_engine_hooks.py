"""What a server builds on: probabilities of prompts, callbacks, counts, and arguments of numpy."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from decoder_cases import make_ids, make_model
from engine_cases import GREEDY, alone, assert_all_alone, engine_of, prompts_of
from tolerances import ENGINE_LOGPROB

from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig, QueueFull
from transnormer.infer.generate import generate
from transnormer.infer.prefix_cache import PrefixCache
from transnormer.infer.request import Request
from transnormer.models.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


def assert_prompt_logprobs(model: Decoder, request: Request) -> None:
    """Fail unless each entry is the model's own, as one pass over the prompt has them."""
    logits = model(request.prompt[None]).logits[0].detach().double()
    exact = logits.log_softmax(-1)
    first, *rest = request.prompt_logprobs
    assert first is None
    assert len(rest) == len(request.prompt) - 1
    for place, entry in enumerate(rest):
        token = int(request.prompt[place + 1])
        assert entry is not None
        assert entry.logprob == pytest.approx(float(exact[place, token]), abs=ENGINE_LOGPROB)
        best = exact[place].topk(2)
        assert [name for name, _ in entry.top] == best.indices.tolist()
        values = [value for _, value in entry.top]
        assert values == pytest.approx(best.values.tolist(), abs=ENGINE_LOGPROB)


@pytest.mark.parametrize("mode", [{}, {"batch_invariant": True}, {"ring": 16}], ids=str)
def test_a_prompt_has_its_own_logprobs_at_every_cut(
    model: Decoder, mode: dict[str, object]
) -> None:
    """Read in pieces, among others, with a prefix cache that knows the prompt."""
    engine = Engine(
        model,
        EngineConfig(slots=3, prefill_tokens=12, **mode),
        prefix_cache=PrefixCache(1 << 20, block_tokens=4),
    )
    prompts = prompts_of((30, 1, 9, 30))
    engine.submit(prompts[0], max_new_tokens=2).result()
    requests = [
        engine.submit(p, max_new_tokens=5, sampling=GREEDY, prompt_logprobs=2 if i != 2 else None)
        for i, p in enumerate(prompts)
    ]
    engine.run()
    assert_all_alone(model, prompts, requests)
    assert requests[0].cached_tokens == 0
    assert requests.pop(2).prompt_logprobs == []
    for request in requests:
        assert_prompt_logprobs(model, request)
    only = engine.submit(prompts[0], max_new_tokens=0, prompt_logprobs=2)
    assert only.result() == []
    assert_prompt_logprobs(model, only)


def test_logprobs_of_ids_that_are_never_drawn_are_zero_probabilities(model: Decoder) -> None:
    engine = Engine(model, draw_below=20)
    request = engine.submit([3, 40, 5], max_new_tokens=0, prompt_logprobs=50)
    request.result()
    beyond, within = request.prompt_logprobs[1:]
    assert beyond is not None
    assert within is not None
    assert beyond.logprob == float("-inf")
    assert len(within.top) == 20
    exact = model(request.prompt[None]).logits[0, 1, :20].detach().double().log_softmax(-1)[5]
    assert within.logprob == pytest.approx(float(exact), abs=ENGINE_LOGPROB)


def test_every_end_is_told_once_with_its_slot_free(model: Decoder) -> None:
    engine = engine_of(model, slots=2)
    ends: list[tuple[Request, str | None, int]] = []

    def note(request: Request) -> None:
        ends.append((request, request.finish_reason, engine.running))
        if request.keep_state and request.finish_reason == "length":
            assert request.state.positions.tolist() == [request.position]

    def submit(count: int, **options: object) -> Request:
        return engine.submit([1, 2], max_new_tokens=count, on_finish=note, **options)

    def broken(ids: Sequence[int]) -> bool:
        raise KeyError("no such text")

    done = submit(1, keep_state=True)
    running, failing, waiting = submit(50), submit(5, until=broken), submit(5)
    waiting.cancel()
    engine.step()
    assert [(r, reason) for r, reason, _ in ends] == [(waiting, "cancelled"), (done, "length")]
    assert ends[-1][2] == 1
    running.cancel()
    engine.run()
    assert {id(r): reason for r, reason, _ in ends} == {
        id(done): "length",
        id(running): "cancelled",
        id(failing): "error",
        id(waiting): "cancelled",
    }
    assert len(ends) == 4


def test_a_callback_that_fails_at_the_end_harms_nobody_else(model: Decoder) -> None:
    engine = engine_of(model)

    def broken(request: Request) -> None:
        raise KeyError("nobody listens")

    bad = engine.submit([1, 2], max_new_tokens=3, on_finish=broken)
    good = engine.submit(prompts_of((5,))[0], max_new_tokens=6, sampling=GREEDY)
    engine.run()
    with pytest.raises(KeyError, match="nobody listens"):
        bad.result()
    assert len(bad.token_ids) == 3
    assert_all_alone(model, prompts_of((5,)), [good])


def test_a_step_that_breaks_off_tells_those_that_ran(model: Decoder) -> None:
    engine, ends = engine_of(model, slots=1), []

    def interrupt(ids: Sequence[int]) -> bool:
        raise KeyboardInterrupt

    engine.submit([1], max_new_tokens=3, until=interrupt, on_finish=ends.append)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [request.finish_reason for request in ends] == ["error"]
    assert engine.metrics().finished["error"] == 1


def test_nobody_changes_the_tokens_of_a_request(model: Decoder) -> None:
    prompt = prompts_of((5,))[0]

    def meddle(ids: Sequence[int]) -> bool:
        with pytest.raises((AttributeError, TypeError)):
            ids.append(3)  # pyrefly: ignore[missing-attribute]
        with pytest.raises(TypeError):
            ids[0] = 3  # pyrefly: ignore[unsupported-operation]
        assert list(ids) == ids[:]
        ids[:].clear()
        return False

    request = engine_of(model).submit(prompt, max_new_tokens=6, sampling=GREEDY, until=meddle)
    for _ in request:
        request.token_ids.clear()
    assert request.result() == alone(model, prompt, 6, temperature=0.0)


def test_metrics_count_what_was_done(model: Decoder) -> None:
    cache = PrefixCache(1 << 20, block_tokens=4)
    engine = Engine(model, EngineConfig(slots=2, queue=0), prefix_cache=cache)
    prompt = make_ids(1, 9)[0]
    engine.submit(prompt, max_new_tokens=3).result()
    first = engine.metrics()
    assert (first.submitted, first.refused, first.finished["length"]) == (1, 0, 1)
    assert (first.prompt_tokens, first.generated_tokens) == (9, 3)
    assert (first.cache_hits, first.cache_misses, first.cached_tokens) == (0, 1, 0)
    assert first.steps == engine.steps
    assert first.step_seconds >= first.last_step_seconds > 0.0
    again = [engine.submit(prompt, max_new_tokens=2) for _ in range(2)]
    assert (engine.metrics().waiting, engine.metrics().running) == (2, 0)
    with pytest.raises(QueueFull):
        engine.submit(prompt, max_new_tokens=2)
    engine.step()
    again[1].cancel()
    engine.run()
    last = engine.metrics()
    assert (last.submitted, last.refused) == (3, 1)
    assert last.finished == {"stop": 0, "length": 2, "cancelled": 1, "error": 0}
    assert (last.cache_hits, last.cache_misses, last.cached_tokens) == (2, 1, 16)
    assert last.prompt_tokens == 9 + 2
    assert last.state_bytes == engine.pool.nbytes


def test_metrics_count_drafts_and_those_that_were_right(model: Decoder) -> None:
    engine = engine_of(model, draft_tokens=3)
    request = engine.submit([5, 6] * 6, max_new_tokens=30, sampling=GREEDY)
    request.result()
    counts = engine.metrics()
    assert counts.drafted_tokens >= counts.accepted_tokens > 0
    assert counts.generated_tokens == 30
    # The first token comes of the prompt, each later step gives one beside the drafts it keeps.
    assert engine.steps == 30 - counts.accepted_tokens


def test_integers_of_numpy_are_integers(model: Decoder) -> None:
    engine, prompt = engine_of(model), make_ids(1, 4)[0]
    exact = alone(model, prompt, 5, seed=2)
    never = np.int32(min({*range(60)} - {*exact}))
    numbers = {"max_new_tokens": np.int64(5), "seed": np.uint32(2), "logprobs": np.int8(1)}
    request = engine.submit(prompt.numpy(), stop=[never], **numbers)
    assert request.result() == exact
    assert all(type(token) is int for token in request.token_ids)
    generation = generate(
        model, prompt[None], max_new_tokens=np.int64(5), seed=np.int64(2), temperature=np.float32(1)
    )
    list(generation)
    assert generation.token_ids == [exact]
    stopped = engine.submit(prompt, stop=np.int64(exact[1]), max_new_tokens=5, seed=2)
    assert stopped.result() == exact[: exact.index(exact[1]) + 1]
    for wrong in (True, np.bool_(True), np.float64(2), torch.tensor(2)):
        with pytest.raises(TypeError, match="max_new_tokens is .*; expected an integer"):
            engine.submit(prompt, max_new_tokens=wrong)
