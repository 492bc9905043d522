"""What is wrong gets an error that says so, and takes nothing from what is right."""

import json
import threading
from typing import Any

import httpx
import pytest
import torch

from transnormer.models.state import DecoderState

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OCTETS = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "hi"}]

# route, body, status, a part of the message
WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no json": (COMPLETIONS, b"{'prompt': 1}", 400, "not JSON"),
    "nothing": (COMPLETIONS, b"", 400, "the body"),
    "a list": (COMPLETIONS, [], 400, "the body"),
    "not utf-8": (COMPLETIONS, b'{"prompt": "\xff"}', 400, "body"),
    "deep": (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000 + b"}", 400, "body"),
    "a number too long": (COMPLETIONS, b'{"prompt": [' + b"9" * 10_000 + b"]}", 400, "body"),
    "no prompt": (COMPLETIONS, {}, 400, "prompt"),
    "prompt of a wrong type": (COMPLETIONS, {"prompt": 5}, 400, "prompt is a int"),
    "no ids": (COMPLETIONS, {"prompt": []}, 400, "prompt is an empty list"),
    "no ids in a list": (COMPLETIONS, {"prompt": [[]]}, 400, "prompt is a list"),
    "ids and texts": (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt is a list"),
    "an id beyond the vocabulary": (COMPLETIONS, {"prompt": [1, 259]}, 400, "the id 259"),
    "an id that no tensor holds": (COMPLETIONS, {"prompt": [2**70]}, 400, "prompt is a list"),
    "a negative id": (COMPLETIONS, {"prompt": [-1]}, 400, "prompt is a list"),
    "half a character": (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "lone surrogate U+D800"),
    "text for a number": (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    "too many tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 10**12}, 400, "at most 2000"),
    "fewer tokens than none": (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    "no tokens without echo": (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is"),
    "another model": (
        COMPLETIONS,
        {"prompt": "a", "model": "gpt-9"},
        404,
        "'gpt-9' does not exist",
    ),
    "an unknown field": (COMPLETIONS, {"prompt": "a", "maxtokens": 1}, 400, "maxtokens"),
    "NaN as a bias": (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"1": NaN}}', 400, "logit_bias"),
    "a bias too large": (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 1e9}}, 400, "logit_bias"),
    "a bias of no token": (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "a bias beyond": (COMPLETIONS, {"prompt": "a", "logit_bias": {"300": 1}}, 400, "token 300"),
    "NaN as a temperature": (
        COMPLETIONS,
        b'{"prompt": "a", "temperature": NaN}',
        400,
        "temperature",
    ),
    "a cold temperature": (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    "a share of nothing": (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    "too many answers": (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, 400, "at most 128"),
    "an empty stop": (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop is"),
    "too many logprobs": (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    "options of no stream": (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "stream"),
    "a state that is not there": (COMPLETIONS, {"prompt": "a", "state": "x"}, 404, "no state 'x'"),
    "a state of two": (
        COMPLETIONS,
        {"prompt": ["a", "b"], "keep_state": True},
        400,
        "prompt holds",
    ),
    "the best of some": (COMPLETIONS, {"prompt": "a", "best_of": 4}, 400, "best_of is 4"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "an unknown role": (CHAT, {"messages": [{"role": "king", "content": ""}]}, 400, "role"),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages",
    ),
    "a tool": (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, 400, "tools"),
    "another format": (
        CHAT,
        {"messages": USER, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    "likeliest of nothing": (CHAT, {"messages": USER, "top_logprobs": 2}, 400, "top_logprobs is 2"),
}


# As streams too, where they are more than bytes.
CASES = [(case, False) for case in WRONG] + [
    (case, True)
    for case, (_, body, _, _) in WRONG.items()
    if isinstance(body, dict) and case != "options of no stream"
]


@pytest.mark.parametrize(
    ("case", "stream"), CASES, ids=[f"{case}{' streamed' * stream}" for case, stream in CASES]
)
def test_a_wrong_request_is_told_what_is_wrong(
    plain: httpx.Client, case: str, stream: bool
) -> None:
    route, body, status, message = WRONG[case]
    if stream:
        body = body | {"stream": True}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = plain.post(route, content=data, headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PATCH", "/v1/states/any", 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/states/other/file", 404),
        ("DELETE", "/v1/states/other", 404),
        ("POST", "/v1/requests/other/end", 404),
    ],
)
def test_a_wrong_address_has_the_same_form_of_error(
    plain: httpx.Client, method: str, path: str, status: int
) -> None:
    response = plain.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/toy", "/v1/states/x"])
def test_head_is_get_without_the_body(plain: httpx.Client, path: str) -> None:
    head, whole = plain.head(path), plain.get(path)
    assert head.status_code == whole.status_code
    assert head.content == b""
    headers = [{k: v for k, v in x.headers.items() if k != "date"} for x in (head, whole)]
    assert headers[0] == headers[1]
    assert int(headers[0]["content-length"]) == len(whole.content) > 0


def test_a_wrong_method_is_told_the_right_ones(plain: httpx.Client) -> None:
    assert plain.put("/v1/models").headers["allow"] == "GET, HEAD"
    assert plain.head("/v1/completions").status_code == 405
    assert plain.head("/v1/completions").headers["allow"] == "POST"


def test_ten_megabytes_are_too_much(plain: httpx.Client) -> None:
    response = plain.post(COMPLETIONS, json={"prompt": "a" * 10_000_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"

    def pieces() -> Any:
        # Without a length, the size shows only as it comes.
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 100_000

    assert plain.post(COMPLETIONS, content=pieces(), headers=JSON).status_code == 413


def test_a_form_of_a_foreign_page_is_no_json(plain: httpx.Client) -> None:
    body = json.dumps({"prompt": "a"})
    response = plain.post(COMPLETIONS, content=body, headers={"Content-Type": "text/plain"})
    assert response.status_code == 400


def test_a_foreign_name_is_refused(plain: httpx.Client) -> None:
    response = plain.get("/v1/models", headers={"Host": "evil.example"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "wrong_host"
    assert plain.get("/v1/models", headers={"Host": "localhost:99"}).status_code == 200


@pytest.fixture
def state_file(plain: httpx.Client) -> bytes:
    """A state as it is saved."""
    asked = {"prompt": "abc", "max_tokens": 1, "keep_state": True}
    name = plain.post(COMPLETIONS, json=asked).json()["state"]["id"]
    return plain.get(f"/v1/states/{name}/file").content


def test_a_damaged_state_is_refused(plain: httpx.Client, state_file: bytes) -> None:
    def load(data: bytes, **headers: str) -> httpx.Response:
        return plain.post("/v1/states", content=data, headers=OCTETS | headers)

    assert load(state_file).status_code == 200
    flipped = state_file[:-1] + bytes([state_file[-1] ^ 1])
    for data in (b"", b"no state", state_file[:-8], flipped):
        response = load(data)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_state"
    assert load(b"x" * 3_000_000).status_code == 413
    assert plain.post("/v1/states", content=state_file).status_code == 415


def test_a_state_with_nan_is_refused(
    plain: httpx.Client, state_file: bytes, toy: Any, tmp_path: Any
) -> None:
    from transnormer import load

    model = load(toy)
    (tmp_path / "state").write_bytes(state_file)
    state = DecoderState.load(tmp_path / "state", model)
    state.layers[0].fill_(float("nan"))
    state.save(tmp_path / "poison", model)
    data = (tmp_path / "poison").read_bytes()
    response = plain.post("/v1/states", content=data, headers=OCTETS)
    assert response.status_code == 400
    assert "NaN" in response.json()["error"]["message"]


@pytest.mark.parametrize("tokens", [-1, 2**63 - 2])
def test_a_state_of_an_impossible_count_of_tokens_is_refused(
    plain: httpx.Client, toy: Any, tmp_path: Any, tokens: int
) -> None:
    from transnormer import load

    model = load(toy)
    layers = model.empty_state(1).layers
    DecoderState(layers, torch.tensor([tokens])).save(tmp_path / "state", model)
    data = (tmp_path / "state").read_bytes()
    response = plain.post("/v1/states", content=data, headers=OCTETS)
    assert response.status_code == 400
    assert f"the state has read {tokens} tokens" in response.json()["error"]["message"]


# No sum in float32 survives it, so that the engine has no token to draw.
POISON = {"prompt": "poison", "max_tokens": 20, "repetition_penalty": 1e-40}


def test_a_poisoned_request_ends_alone(plain: httpx.Client) -> None:
    response = plain.post(COMPLETIONS, json=POISON)
    assert response.status_code == 400
    assert "the largest logit of the request is inf" in response.json()["error"]["message"]
    with plain.stream("POST", COMPLETIONS, json=POISON | {"stream": True}) as stream:
        events = [line for line in stream.iter_lines() if line]
    assert "the largest logit" in json.loads(events[-1][6:])["error"]["message"]


def test_healthy_answers_do_not_change_beside_wrong_ones(plain: httpx.Client) -> None:
    asked = {"prompt": "healthy", "max_tokens": 60, "seed": 11}
    alone = plain.post(COMPLETIONS, json=asked).json()["choices"]
    statuses: list[int] = []
    stop = threading.Event()

    def disturb() -> None:
        with httpx.Client(base_url=plain.base_url, trust_env=False) as client:
            while not stop.is_set():
                for case in ("NaN as a bias", "an id beyond the vocabulary", "no json"):
                    route, body, _, _ = WRONG[case]
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    found = client.post(route, content=data, headers=JSON)
                    statuses.append(found.status_code)
                statuses.append(client.post(COMPLETIONS, json=POISON).status_code)

    thread = threading.Thread(target=disturb)
    thread.start()
    beside = [plain.post(COMPLETIONS, json=asked).json()["choices"] for _ in range(2)]
    stop.set()
    thread.join()
    assert beside == [alone] * 2
    assert statuses
    assert set(statuses) == {400}
