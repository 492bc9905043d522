"""The engine: tokens under load are those alone, and one request's trouble is its own."""

import functools
import math
import threading

import pytest
import torch
import torch._dynamo.testing
from decoder_cases import VOCAB, make_ids, make_model, tnl_config
from engine_cases import (
    GREEDY,
    alone,
    assert_all_alone,
    assert_same_tokens,
    engine_of,
    prompts_of,
)
from torch import Tensor

from transnormer.infer import pool
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig, QueueFull
from transnormer.infer.request import Request
from transnormer.infer.sampling import SamplingConfig
from transnormer.models import compilation
from transnormer.models.decoder import BlockConfig, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.token_mixers import CosformerConfig, SoftmaxConfig

MODES = {
    "plain": {},
    "invariant": {"batch_invariant": True},
    "ring": {"ring": 16},
    "invariant-ring": {"ring": 16, "batch_invariant": True},
    "ahead": {"run_ahead": True},
    "ahead-ring": {"run_ahead": True, "ring": 16},
    "drafts": {"draft_tokens": 4},
    "drafts-ring": {"draft_tokens": 7, "ring": 16},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


@modes
def test_greedy_tokens_under_load_are_those_alone(model: Decoder, mode: dict[str, object]) -> None:
    engine = engine_of(model, **mode)
    prompts = prompts_of()
    requests = [engine.submit(p, max_new_tokens=15, sampling=GREEDY) for p in prompts]
    engine.run()
    assert [r.finish_reason for r in requests] == ["length"] * len(prompts)
    assert_all_alone(model, prompts, requests)


@modes
def test_sampled_tokens_under_load_are_those_of_generate(
    model: Decoder, mode: dict[str, object]
) -> None:
    engine = engine_of(model, **mode)
    options = [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 9, "top_p": 0.5}]
    prompts = prompts_of((5, 1, 9, 30))
    requests = [
        engine.submit(p, max_new_tokens=12, sampling=SamplingConfig(**own), seed=seed)
        for seed, (p, own) in enumerate(zip(prompts, options, strict=True))
    ]
    engine.run()
    for seed, (prompt, own, request) in enumerate(zip(prompts, options, requests, strict=True)):
        assert request.token_ids == alone(model, prompt, 12, seed=seed, **own)


def logprobs_of(request: Request) -> list[float]:
    return [value for entry in request.logprobs for _, value in entry.top]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ring", [None, 16])
def test_the_batch_invariant_mode_gives_the_same_bits(dtype: torch.dtype, ring: int | None) -> None:
    model = make_model(dtype=dtype)
    prompts = prompts_of()

    def run(chosen: list[int]) -> dict[int, list[float]]:
        engine = engine_of(model, slots=4, prefill_tokens=20, batch_invariant=True, ring=ring)
        requests = {
            i: engine.submit(prompts[i], max_new_tokens=9, sampling=GREEDY, logprobs=VOCAB)
            for i in chosen
        }
        engine.run()
        return {i: logprobs_of(request) for i, request in requests.items()}

    loaded, shuffled = run([0, 1, 2, 3, 4, 5, 6]), run([6, 3, 0, 5])
    for i in (1, 3, 6):
        assert run([i])[i] == loaded[i]
    assert all(shuffled[i] == loaded[i] for i in shuffled)


def test_a_step_reads_no_more_than_it_may_and_nobody_waits_for_it(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = model.forward

    def watch(input_ids: Tensor, **options: object) -> object:
        calls.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", watch)
    engine = engine_of(model)
    running = engine.submit(make_ids(1, 3)[0], max_new_tokens=25, sampling=GREEDY)
    engine.step()
    engine.submit(make_ids(1, 150)[0], max_new_tokens=2, sampling=GREEDY)
    while not running.finished:
        before, calls[:] = len(running.token_ids), []
        engine.step()
        assert len(running.token_ids) == before + 1
        assert sum(calls) <= 12 + 4


@pytest.mark.parametrize("invariant", [False, True], ids=["shared", "invariant"])
@pytest.mark.parametrize("seed", range(2))
def test_every_request_begins_when_it_was_told(model: Decoder, seed: int, invariant: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 40, (14, 2), generator=generator).tolist()
    engine = engine_of(model, slots=2, prefill_tokens=8, batch_invariant=invariant)
    requests: list[Request] = []
    for length, count in numbers:
        requests.append(
            engine.submit(make_ids(1, length)[0], max_new_tokens=1 + count // 8, sampling=GREEDY)
        )
        if count % 3 == 0:
            engine.step()
    engine.run()
    order = [request.first_token_at for request in requests]
    assert all(at is not None for at in order)
    for request in requests:
        assert request.submitted_at < request.first_token_at <= request.first_token_by
    # The promise is one that a full queue comes near to.
    assert max(requests[-1].first_token_at / r.first_token_by for r in requests[-1:]) > 0.5


def test_prompts_are_read_in_one_packed_call(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []
    forward = model.forward

    def watch(input_ids: Tensor, **options: object) -> object:
        if options.get("cu_seqlens") is not None:
            bounds.append(options["cu_seqlens"].tolist())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", watch)
    engine = engine_of(model, prefill_tokens=30)
    requests = [engine.submit(p, max_new_tokens=1) for p in prompts_of((5, 1, 17))]
    engine.step()
    assert bounds == [[0, 5, 6, 23]]
    assert all(request.finished for request in requests)


def test_a_full_queue_refuses_and_goes_on(model: Decoder) -> None:
    engine = engine_of(model, slots=2, queue=1)
    requests = [engine.submit(p, max_new_tokens=3, sampling=GREEDY) for p in prompts_of((3, 4, 5))]
    with pytest.raises(QueueFull, match=r"queue holds 3 requests; expected less than 3, one for"):
        engine.submit([1], max_new_tokens=1)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    with pytest.raises(QueueFull, match="queue holds 1 requests; expected less than 1") as refusal:
        engine.submit([1], max_new_tokens=1)
    assert (refusal.value.waiting, refusal.value.bound) == (1, 1)
    engine.run()
    assert_all_alone(model, prompts_of((3, 4, 5)), requests)
    assert engine.submit([1], max_new_tokens=1).result()


def test_a_cancelled_request_ends_wherever_it_is(model: Decoder) -> None:
    engine = engine_of(model, slots=2)
    running, reading, waiting, last = (
        engine.submit(p, max_new_tokens=9, sampling=GREEDY) for p in prompts_of((2, 60, 5, 7))
    )
    engine.step()
    engine.step()
    assert running.token_ids
    assert not reading.token_ids
    taken = list(running.token_ids)
    for request in (running, reading, waiting):
        request.cancel()
    engine.step()
    assert [r.finish_reason for r in (running, reading, waiting)] == ["cancelled"] * 3
    assert running.result() == taken
    assert (engine.running, engine.waiting) == (1, 0)
    assert_all_alone(model, prompts_of((7,)), [last])


def test_a_cancelled_request_leaves_the_queue_at_once(model: Decoder) -> None:
    engine = engine_of(model, slots=1, queue=1)
    engine.submit([1], max_new_tokens=9)
    engine.step()
    engine.submit([2], max_new_tokens=9).cancel()
    engine.step()
    assert (engine.running, engine.waiting) == (1, 0)
    engine.submit([3], max_new_tokens=9)


def test_a_poisoned_state_harms_nobody_else(model: Decoder) -> None:
    """NaN in a request's state: in the packed prompt, in the batch, and in a slot used again."""
    state = model(make_ids(1, 4)).state
    bad = DecoderState(tuple(x * math.nan for x in state.layers), state.positions)
    for mode in MODES.values():
        engine = engine_of(model, slots=2, **mode)
        prompts = prompts_of((3, 4, 5, 6))
        requests = [
            engine.submit(p, max_new_tokens=6, sampling=GREEDY, state=bad if i == 1 else None)
            for i, p in enumerate(prompts)
        ]
        engine.run()
        poisoned = requests.pop(1)
        assert (poisoned.finish_reason, poisoned.token_ids) == ("error", [])
        with pytest.raises(ValueError, match=r"largest logit of the request is nan; expected a"):
            poisoned.result()
        assert_all_alone(model, [prompts[0], *prompts[2:]], requests)


def test_a_poisoned_bias_harms_nobody_else(model: Decoder) -> None:
    with pytest.raises(ValueError, match="logit_bias of token 3 is nan; expected a finite number"):
        SamplingConfig(logit_bias=((3, math.nan),))
    none = SamplingConfig(temperature=0.0, logit_bias=tuple((i, -math.inf) for i in range(VOCAB)))
    engine = engine_of(model)
    bad = engine.submit([1, 2], max_new_tokens=4, sampling=none)
    good = engine.submit(prompts_of((5,))[0], max_new_tokens=6, sampling=GREEDY)
    engine.run()
    assert bad.finish_reason == "error"
    with pytest.raises(ValueError, match="every token is forbidden"):
        bad.result()
    assert_all_alone(model, prompts_of((5,)), [good])


def test_a_callback_ends_its_own_request(model: Decoder) -> None:
    engine = engine_of(model)
    prompt = prompts_of((5,))[0]

    def broken(ids: object) -> bool:
        raise KeyError("no such text")

    short = engine.submit(prompt, max_new_tokens=9, until=lambda ids: len(ids) == 4)
    failing = engine.submit(prompt, max_new_tokens=9, until=broken)
    whole = engine.submit(prompt, max_new_tokens=9, sampling=GREEDY)
    engine.run()
    assert (short.finish_reason, len(short.token_ids)) == ("stop", 4)
    assert failing.finish_reason == "error"
    with pytest.raises(KeyError, match="no such text"):
        failing.result()
    assert_all_alone(model, [prompt], [whole])


def test_stops_are_those_of_generate(model: Decoder) -> None:
    prompt = make_ids(1, 4)[0]
    ids = alone(model, prompt, 8, seed=2)
    engine = engine_of(model)
    for stop in (ids[2], [ids[2:5]], [[ids[1], ids[3]]]):
        request = engine.submit(prompt, max_new_tokens=8, seed=2, stop=stop)
        assert request.result() == alone(model, prompt, 8, seed=2, stop=stop)
    ending = make_model(tnl_config(eos_token_id=ids[2]))
    request = engine_of(ending).submit(prompt, max_new_tokens=8, seed=2)
    assert request.result()[-1] == ids[2]
    assert request.finish_reason == "stop"


def test_logprobs_are_the_models_own(model: Decoder) -> None:
    prompt = make_ids(1, 6)[0]
    engine = engine_of(model)
    sampling = SamplingConfig(temperature=0.3, presence_penalty=0.5, logit_bias=((3, 1.0),))
    request = engine.submit(prompt, max_new_tokens=5, sampling=sampling, seed=1, logprobs=2)
    ids = request.result()
    assert len(request.logprobs) == 5
    for i, (token, entry) in enumerate(zip(ids, request.logprobs, strict=True)):
        text = torch.cat([prompt, torch.tensor(ids[:i], dtype=torch.int64)])
        exact = model(text[None]).logits[0, -1].log_softmax(-1)
        assert entry.logprob == pytest.approx(exact[token].item(), abs=1e-5)
        values, top = exact.topk(2)
        assert [token for token, _ in entry.top] == top.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


@modes
def test_a_conversation_forks_and_goes_on(
    model: Decoder, mode: dict[str, object], tmp_path: object
) -> None:
    engine = engine_of(model, **mode)
    first, *turns = prompts_of((9, 3, 5))
    opening = engine.submit(first, max_new_tokens=4, sampling=GREEDY, keep_state=True)
    said = torch.tensor(opening.result())
    state = opening.state
    assert state.positions.tolist() == [13]
    before = state.clone()
    state.save(tmp_path / "state.safetensors", model)
    restored = DecoderState.load(tmp_path / "state.safetensors", model)
    branches = [
        engine.submit(turn, max_new_tokens=6, sampling=GREEDY, state=restored) for turn in turns
    ]
    engine.run()
    for turn, branch in zip(turns, branches, strict=True):
        text = torch.cat([first, said, turn])
        assert_same_tokens(model, text, branch.token_ids, alone(model, text, 6, temperature=0.0))
    assert all(torch.equal(a, b) for a, b in zip(before.layers, restored.layers, strict=True))


def test_no_new_tokens_only_read_the_prompt(model: Decoder) -> None:
    prompt = make_ids(1, 20)[0]
    request = engine_of(model).submit(prompt, max_new_tokens=0, keep_state=True)
    assert request.result() == []
    assert request.state.positions.tolist() == [20]
    assert request.finish_reason == "length"


def test_requests_come_from_other_threads_while_it_steps(model: Decoder) -> None:
    engine = engine_of(model, slots=2, queue=50)
    prompts, requests = prompts_of((3, 4, 5, 6)), {}

    def submit(row: int) -> None:
        for _ in range(3):
            requests.setdefault(row, []).append(
                engine.submit(prompts[row], max_new_tokens=4, sampling=GREEDY)
            )

    threads = [threading.Thread(target=submit, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    while engine.step() or any(thread.is_alive() for thread in threads):
        pass
    engine.run()
    for row, prompt in enumerate(prompts):
        assert len(requests[row]) == 3
        assert_all_alone(model, [prompt] * 3, requests[row])
        assert all(r.first_token_at <= r.first_token_by for r in requests[row])


def test_iterating_runs_the_engine_for_all(model: Decoder) -> None:
    engine = engine_of(model)
    a, b = (engine.submit(p, max_new_tokens=5, sampling=GREEDY) for p in prompts_of((5, 4)))
    for i, token in enumerate(a):
        assert a.token_ids[i] == token
    assert len(a.token_ids) == len(b.token_ids) == 5
    assert list(b) == b.token_ids


def test_the_engine_leaves_the_model_in_its_mode() -> None:
    model = make_model(tnl_config(dropout=0.5))
    exact = alone(model, make_ids(1, 4)[0], 5, temperature=0.0)
    model.train()
    request = engine_of(model).submit(make_ids(1, 4)[0], max_new_tokens=5, sampling=GREEDY)
    assert request.result() == exact
    assert model.training


def test_ids_from_a_limit_on_are_never_drawn(model: Decoder) -> None:
    engine = Engine(model, draw_below=5)
    request = engine.submit(make_ids(1, 4)[0], max_new_tokens=20, seed=1)
    assert max(request.result()) < 5
    # The prompt and the bias name ids beyond the limit.
    sampling = SamplingConfig(repetition_penalty=1.5, logit_bias=((40, 100.0), (3, 1.0)))
    other = engine.submit([60, 2], max_new_tokens=20, seed=1, sampling=sampling, logprobs=5)
    assert max(other.result()) < 5
    assert sum(math.exp(value) for _, value in other.logprobs[0].top) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="draw_below is 0; expected at least 1"):
        Engine(model, draw_below=0)


COSFORMER = BlockConfig(token_mixer=CosformerConfig(heads=2, max_positions=10), channel_mixer=None)


@pytest.mark.parametrize("limit", [{"max_positions": 10}, {"blocks": (COSFORMER,)}], ids=str)
def test_positions_end_where_they_end(limit: dict[str, object]) -> None:
    engine = engine_of(make_model(tnl_config(**limit)))
    assert len(engine.submit([1, 2, 3], max_new_tokens=7).result()) == 7
    with pytest.raises(ValueError, match=r"max_new_tokens is 8 after 3 tokens; expected at most 7"):
        engine.submit([1, 2, 3], max_new_tokens=8)


BAD = {
    "empty": ({"prompt": []}, "prompt"),
    "beyond": ({"prompt": [VOCAB]}, "prompt holds the id 61; expected 0 <= id < 61"),
    "matrix": ({"prompt": [[1]]}, r"prompt has shape \[1, 1\]; expected \[tokens\]"),
    "count": ({"max_new_tokens": -1}, "max_new_tokens is -1; expected at least 0"),
    "logprobs": ({"logprobs": -1}, "logprobs is -1"),
    "seed": ({"seed": -1}, "seed is -1"),
    "stop": ({"stop": [[]]}, r"stop\[0\] is empty"),
    "bias": (
        {"sampling": SamplingConfig(logit_bias=((99, 1.0),))},
        "logit_bias names the token 99; expected less than 61",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_before_it_waits(model: Decoder, name: str) -> None:
    changes, message = BAD[name]
    engine = engine_of(model)
    arguments = {"prompt": [1, 2], "max_new_tokens": 1, **changes}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        engine.submit(arguments.pop("prompt"), **arguments)
    assert "\n" not in str(caught.value)
    assert engine.waiting == 0


def test_a_state_that_is_not_the_models_is_refused(model: Decoder) -> None:
    engine = engine_of(model)
    state = model(make_ids(2, 3)).state
    with pytest.raises(ValueError, match="state has 2 rows; expected 1"):
        engine.submit([1], max_new_tokens=1, state=state)
    one = state.select([0])
    small = one._replace(layers=(*one.layers[:2], one.layers[2][:, :1]))
    with pytest.raises(ValueError, match=r"state.layers\[2\] has shape \[1, 1, 16, 16\]; expected"):
        engine.submit([1], max_new_tokens=1, state=small)
    double = one._replace(layers=tuple(x.double() for x in one.layers))
    with pytest.raises(TypeError, match=r"state.layers\[0\] is torch.float64; expected torch.fl"):
        engine.submit([1], max_new_tokens=1, state=double)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 8, "prefill_tokens": 7}, "prefill_tokens is 7; expected at least slots, 8"),
        ({"ring": 8, "draft_tokens": 4}, "ring is 8; expected at least 10"),
        ({"draft_tokens": 4, "batch_invariant": True}, "draft_tokens is 4; expected 0 with batch"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)


@pytest.mark.parametrize("ring", [None, 16])
def test_compiled_blocks_decode_and_plain_ones_read(
    ring: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile_plainly = functools.partial(compilation.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(pool, "compile_blocks", compile_plainly)
    model, prompts = make_model(), prompts_of((4, 9))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_plainly.keywords["backend"] = counter
    engine = engine_of(model, ring=ring, compile=True, batch_invariant=True)
    requests = [engine.submit(p, max_new_tokens=8, sampling=GREEDY) for p in prompts]
    engine.run()
    # The block with LRPE and the others; none for a prompt's length.
    assert counter.frame_count == 2
    for prompt, request in zip(prompts, requests, strict=True):
        exact = alone(make_model(), prompt, 8, temperature=0.0)
        assert_same_tokens(make_model(), prompt, request.token_ids, exact)
    torch._dynamo.reset()


def test_a_growing_state_is_not_compiled() -> None:
    blocks = (BlockConfig(token_mixer=SoftmaxConfig(heads=2), channel_mixer=None),)
    with pytest.raises(NotImplementedError, match="compile is True; expected False for this model"):
        engine_of(make_model(tnl_config(blocks=blocks)), compile=True)


def test_a_bidirectional_model_has_no_engine() -> None:
    with pytest.raises(ValueError, match=r"config\.causal is False"):
        Engine(make_model(tnl_config(causal=False)))
