"""/v1/completions, judged by OpenAI's client and by the model itself."""

from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from tolerances import ENGINE_LOGPROB

from transnormer import generate, load
from transnormer.models.decoder import Decoder

BOS, EOS = 257, 258
PROMPT = "The state"


@pytest.fixture(scope="module")
def model(toy: Path) -> Decoder:
    """What the server serves."""
    return load(toy)


def greedy(model: Decoder, ids: list[int], count: int) -> bytes:
    """What the model says after some ids, as its tokens' bytes."""
    prompt = torch.tensor([ids])
    generation = generate(model, prompt, max_new_tokens=count, temperature=0.0, stop=[[EOS]])
    for _ in generation:
        pass
    return bytes(token for token in generation.token_ids[0] if token < 256)


def test_text_is_that_of_generate(judge: OpenAI, model: Decoder) -> None:
    answer = judge.completions.create(model="toy", prompt=PROMPT, max_tokens=24, temperature=0)
    expected = greedy(model, [BOS, *PROMPT.encode()], 24)
    assert answer.choices[0].text == expected.decode(errors="replace")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + len(PROMPT)
    assert answer.usage.completion_tokens == 24


def test_ids_are_taken_as_they_are(judge: OpenAI, model: Decoder) -> None:
    ids = [5, 6, 7]
    answer = judge.completions.create(model="toy", prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == greedy(model, ids, 8).decode(errors="replace")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_stream_joins_to_the_whole(judge: OpenAI) -> None:
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 60, "seed": 3, "temperature": 1.5}
    whole = judge.completions.create(**asked)
    stream = list(
        judge.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == (
        whole.choices[0].text
    )
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) <= {None}
    assert stream[-1].choices == []
    assert stream[-1].usage == whole.usage


def test_characters_of_several_tokens_come_whole(judge: OpenAI) -> None:
    # Only the bytes of one Chinese character can be drawn, in whatever order.
    bias = {str(byte): 100 for byte in "你".encode()}
    stream = judge.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "你好"}],
        max_tokens=200,
        seed=5,
        logit_bias=bias,
        logprobs=True,
        stream=True,
    )
    text, data = "", b""
    for chunk in stream:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for token in (choice.logprobs and choice.logprobs.content) or ():
            data += bytes(token.bytes or ())
    assert len(data) == 200
    assert text == data.decode(errors="replace")
    assert "你" in text


def test_seed_decides_and_choices_have_seeds_of_their_own(judge: OpenAI) -> None:
    # Without an end, so that the counts are known.
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 20, "logit_bias": {str(EOS): -100}}
    pair = judge.completions.create(**asked, seed=7, n=2)
    texts = [choice.text for choice in pair.choices]
    assert texts == [
        judge.completions.create(**asked, seed=seed).choices[0].text for seed in (7, 8)
    ]
    assert texts[0] != texts[1]
    assert pair.usage is not None
    assert pair.usage.prompt_tokens == 1 + len(PROMPT)
    assert pair.usage.completion_tokens == 40


def test_prompts_of_a_list_are_answered_as_alone(judge: OpenAI) -> None:
    asked = {"model": "toy", "max_tokens": 12, "temperature": 0}
    prompts = ["one", "another one", "三"]
    together = judge.completions.create(**asked, prompt=prompts)
    alone = [judge.completions.create(**asked, prompt=prompt) for prompt in prompts]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_scores_the_prompt(judge: OpenAI, model: Decoder, stream: bool) -> None:
    ids = [BOS, *PROMPT.encode()]
    answer = judge.completions.create(
        model="toy", prompt=PROMPT, max_tokens=0, echo=True, logprobs=3, stream=stream
    )
    found = [chunk for chunk in answer if chunk.choices][0] if stream else answer
    choice = found.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["token_id:257", *PROMPT]
    assert choice.logprobs.text_offset == [0, *range(len(PROMPT))]
    exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = torch.arange(len(ids) - 1)
    expected = exact[rows, torch.tensor(ids[1:])].tolist()
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=ENGINE_LOGPROB)
    assert choice.logprobs.top_logprobs is not None
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert best == pytest.approx(exact[:-1].amax(-1).tolist(), abs=ENGINE_LOGPROB)


def test_logprobs_of_a_stream_are_those_of_the_whole(judge: OpenAI) -> None:
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 40, "seed": 1, "logprobs": 2}
    whole = judge.completions.create(**asked).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in judge.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs is not None
    ]
    assert whole is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert sum((getattr(part, name) for part in parts), []) == getattr(whole, name), name


def test_stop_text_ends_the_answer_and_its_tokens(judge: OpenAI) -> None:
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 80, "seed": 2}
    whole = judge.completions.create(**asked).choices[0].text
    stop = whole[20:23]
    cut = judge.completions.create(**asked, stop=[stop], logprobs=0).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.logprobs is not None
    assert cut.logprobs.text_offset is not None
    assert max(cut.logprobs.text_offset) < len(cut.text)
    streamed = judge.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_bias_and_penalties_reach_the_engine(judge: OpenAI) -> None:
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    assert judge.completions.create(**asked, logit_bias={"65": 100}).choices[0].text == "A" * 10
    two = judge.completions.create(
        **asked | {"temperature": 1, "presence_penalty": 50}, logit_bias={"65": 100, "66": 90}
    )
    assert two.choices[0].text[:2] == "AB"
    # One candidate leaves no choice to any temperature.
    one = judge.completions.create(**asked | {"temperature": 90}, extra_body={"top_k": 1})
    assert one.choices[0].text == judge.completions.create(**asked).choices[0].text


def test_models_name_what_is_served(judge: OpenAI, model: Decoder) -> None:
    (card,) = judge.models.list().data
    assert card.id == "toy"
    assert judge.models.retrieve("toy") == card
    extra = card.model_extra
    assert extra is not None
    assert extra["parameters"] == model.num_parameters()
    assert extra["state_bytes_per_token"] == 0


def test_figures_count_what_was_done(plain: httpx.Client) -> None:
    def figures() -> dict[str, float]:
        lines = plain.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = figures()
    body = {"prompt": "abc", "max_tokens": 9, "temperature": 0, "stop": []}
    assert plain.post("/v1/completions", json=body).status_code == 200
    after = figures()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["transnormer_generated_tokens_total"] == 9
    assert grown["transnormer_prompt_tokens_total"] == 4
    assert grown['transnormer_http_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown["transnormer_first_token_seconds_count"] == 1
    assert after["transnormer_running"] == 0
