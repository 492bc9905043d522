"""What the tests of the engine share: prompts, and the one rule for when tokens are wrong."""

from collections.abc import Sequence

import torch
from decoder_cases import make_ids
from tolerances import TOP2_GAP
from torch import Tensor

from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.generate import generate
from transnormer.infer.request import Request
from transnormer.infer.sampling import SamplingConfig
from transnormer.models.decoder import Decoder

GREEDY = SamplingConfig(temperature=0.0)
LENGTHS = (5, 1, 9, 30, 17, 4, 12)


def prompts_of(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """One prompt a length, each of its own seed."""
    return [make_ids(1, length, seed=length)[0] for length in lengths]


def engine_of(model: Decoder, **options: object) -> Engine:
    """An engine of three slots that reads 12 tokens of prompts a step, or as told."""
    return Engine(model, EngineConfig(**{"slots": 3, "prefill_tokens": 12, **options}))


_ALONE: dict[tuple[object, ...], list[int]] = {}


def alone(model: Decoder, prompt: Tensor, count: int, **options: object) -> list[int]:
    """What ``generate`` gives for a prompt by itself; computed once for each model and prompt."""
    key = (model, tuple(prompt.tolist()), count, *options.items())
    if any(isinstance(value, list) for value in options.values()):
        return _alone(model, prompt, count, **options)
    if key not in _ALONE:
        _ALONE[key] = _alone(model, prompt, count, **options)
    return _ALONE[key]


def _alone(model: Decoder, prompt: Tensor, count: int, **options: object) -> list[int]:
    generation = generate(model, prompt[None], max_new_tokens=count, **options)
    for _ in generation:
        pass
    return generation.token_ids[0]


def assert_same_tokens(model: Decoder, prompt: Tensor, actual: list[int], exact: list[int]) -> None:
    """Fail unless greedy tokens agree, or part where the two likeliest are closer than rounding."""
    if actual == exact:
        return
    at = next(i for i, (a, b) in enumerate(zip(actual, exact, strict=True)) if a != b)
    ids = torch.cat([prompt, torch.tensor(exact[:at], dtype=torch.int64)])
    top = model(ids[None]).logits[0, -1].double().topk(2).values
    gap = float(top[0] - top[1])
    assert gap < TOP2_GAP, f"token {at} is {actual[at]}, expected {exact[at]}; the gap is {gap:.3g}"


def assert_all_alone(model: Decoder, prompts: list[Tensor], requests: list[Request]) -> None:
    """Fail unless every greedy request got the tokens it gets by itself."""
    for prompt, request in zip(prompts, requests, strict=True):
        exact = alone(model, prompt, request.max_new_tokens, temperature=0.0)
        assert_same_tokens(model, prompt, request.result(), exact)
