"""The prefix cache: a hit gives the tokens of a miss, and the bounds of its memory hold."""

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model
from engine_cases import GREEDY, assert_all_alone
from torch import Tensor

from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.prefix_cache import PrefixCache, snapshot_bytes
from transnormer.infer.request import Request
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState

BLOCK = 8


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


def engine_of(model: Decoder, cache: PrefixCache | None, **options: object) -> Engine:
    config = EngineConfig(**{"slots": 3, "prefill_tokens": 15, **options})
    return Engine(model, config, prefix_cache=cache)


def beginnings() -> list[Tensor]:
    """Prompts with common beginnings of 19 tokens, and one that shares its first block alone."""
    common = make_ids(1, 19)[0]
    tails = [make_ids(1, length, seed=length)[0] for length in (4, 11, 2, 30)]
    return [*(torch.cat([common, tail]) for tail in tails), torch.cat([common[:BLOCK], tails[3]])]


def run(engine: Engine, prompts: list[Tensor], **options: object) -> list[Request]:
    requests = []
    for prompt in prompts:
        requests.append(engine.submit(prompt, max_new_tokens=6, sampling=GREEDY, **options))
        engine.run()
    return requests


@pytest.mark.parametrize("mode", [{}, {"ring": 16}, {"draft_tokens": 3}], ids=str)
def test_hits_give_the_tokens_of_misses(model: Decoder, mode: dict[str, object]) -> None:
    requests = run(engine_of(model, PrefixCache(10**7, block_tokens=BLOCK), **mode), beginnings())
    assert [request.cached_tokens for request in requests] == [0, 16, 16, 16, 8]
    assert_all_alone(model, beginnings(), requests)


def test_hits_give_the_bits_of_misses_where_batches_do_not_matter(model: Decoder) -> None:
    cache = PrefixCache(10**7, block_tokens=BLOCK)
    bits = {}
    for name in ("miss", "hit"):
        engine = engine_of(model, cache, batch_invariant=True)
        requests = run(engine, beginnings(), logprobs=VOCAB)
        bits[name] = [request.logprobs for request in requests]
        assert [bool(request.cached_tokens) for request in requests][0] == (name == "hit")
    assert bits["hit"] == bits["miss"]


def test_the_whole_prompt_again_still_reads_its_last_block(model: Decoder) -> None:
    engine = engine_of(model, PrefixCache(10**7, block_tokens=BLOCK))
    prompts = [make_ids(1, 2 * BLOCK)[0]] * 2
    requests = run(engine, prompts)
    assert [request.cached_tokens for request in requests] == [0, BLOCK]
    assert_all_alone(model, prompts, requests)


def test_a_request_that_goes_on_from_a_state_leaves_no_snapshot(model: Decoder) -> None:
    cache = PrefixCache(10**7, block_tokens=BLOCK)
    state = model(make_ids(1, 3)).state
    run(engine_of(model, cache), beginnings()[:1], state=state)
    assert len(cache) == 0


def test_models_do_not_share_snapshots(model: Decoder) -> None:
    cache = PrefixCache(10**7, block_tokens=BLOCK)
    run(engine_of(model, cache), beginnings()[:1])
    other = make_model()
    with torch.no_grad():
        other.blocks[0].token_mixer.out_proj.weight[0, 0] += 1.0
    requests = run(engine_of(other, cache), beginnings()[:1])
    assert requests[0].cached_tokens == 0
    assert_all_alone(other, beginnings()[:1], requests)


def test_two_snapshots_near_and_two_on_the_cpu(model: Decoder) -> None:
    """Room for two of each: bounds hold at every step, and what was spilled is found again."""
    size = snapshot_bytes(model.empty_state(1))
    cache = PrefixCache(2 * size, spill_bytes=2 * size + 1, block_tokens=BLOCK)
    engine = engine_of(model, cache)
    prompts = [make_ids(1, BLOCK + 3, seed=seed)[0] for seed in range(6)]
    found = []
    for prompt in [*prompts[:4], prompts[0], prompts[1], *prompts[4:], prompts[2], prompts[1]]:
        request = engine.submit(prompt, max_new_tokens=4, sampling=GREEDY)
        while engine.step():
            assert cache.nbytes <= 2 * size
            assert cache.spilled_bytes <= 2 * size + 1
            assert len(cache) <= 4
        assert_all_alone(model, [prompt], [request])
        found.append(request.cached_tokens)
    # The last two prompts drove out 2 and 3, which were used least recently; 1 is still there.
    assert found == [0, 0, 0, 0, BLOCK, BLOCK, 0, 0, 0, BLOCK]
    assert (cache.nbytes, cache.spilled_bytes) == (2 * size, 2 * size)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.spilled_bytes) == (0, 0, 0)


def test_there_is_no_hit_without_a_state(model: Decoder) -> None:
    """A block whose own snapshot left is no hit, also where one further on is still stored."""
    size = snapshot_bytes(model.empty_state(1))
    cache = PrefixCache(size, block_tokens=BLOCK)
    keys = cache.keys(make_ids(1, 4 * BLOCK + 3)[0], "model")
    assert len(keys) == 4
    for count, key in enumerate(keys, 1):
        state = model.empty_state(1)
        state.positions.fill_(count * BLOCK)
        cache.put(key, state)
    assert [key in cache for key in keys] == [False, False, False, True]
    assert cache.longest(keys[:3]) == (0, None)
    blocks, state = cache.longest(keys)
    assert (blocks, state.positions.item()) == (4, 4 * BLOCK)


def test_the_snapshot_used_least_recently_leaves_first(model: Decoder) -> None:
    size = snapshot_bytes(model.empty_state(1))
    for use in ("find", "put"):
        cache = PrefixCache(2 * size)
        cache.put(b"a", model.empty_state(1))
        cache.put(b"b", model.empty_state(1))
        if use == "find":
            assert cache.longest([b"a"])[0] == 1
        else:
            cache.put(b"a", model.empty_state(1))
        cache.put(b"c", model.empty_state(1))
        assert [key in cache for key in (b"a", b"b", b"c")] == [True, False, True]
    cache = PrefixCache(3 * size)
    for key in (b"a", b"b", b"a"):
        cache.put(key, model.empty_state(1))
    assert (len(cache), cache.nbytes) == (2, 2 * size)


def test_keys_follow_from_everything_before_them() -> None:
    cache = PrefixCache(1, block_tokens=4)
    ids = make_ids(1, 12)[0]
    changed = ids.clone()
    changed[1] = (changed[1] + 1) % VOCAB
    keys, others = cache.keys(ids, "a"), cache.keys(changed, "a")
    assert len(set(keys) | set(others) | set(cache.keys(ids, "b"))) == 9
    assert cache.keys(ids[:11], "a") == keys[:2]
    assert cache.keys(ids[:3], "a") == []


def test_a_snapshot_that_has_no_room_is_not_kept(model: Decoder) -> None:
    cache = PrefixCache(10, block_tokens=BLOCK)
    requests = run(engine_of(model, cache), beginnings()[:2])
    assert (len(cache), cache.nbytes) == (0, 0)
    assert [request.cached_tokens for request in requests] == [0, 0]


def test_snapshots_do_not_change_with_their_slots(model: Decoder) -> None:
    cache = PrefixCache(10**7, block_tokens=BLOCK)
    prompts = beginnings()
    run(engine_of(model, cache), prompts[:1])
    keys = cache.keys(prompts[0], model.fingerprint())
    _, state = cache.longest(keys)
    assert state is not None
    before: DecoderState = state.clone()
    run(engine_of(model, cache), prompts)
    assert all(torch.equal(a, b) for a, b in zip(before.layers, state.layers, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_bytes": -1}, "max_bytes is -1; expected at least 0"),
        ({"max_bytes": 1, "spill_bytes": -1}, "spill_bytes is -1"),
        ({"max_bytes": 1, "block_tokens": 0}, "block_tokens is 0; expected at least 1"),
    ],
)
def test_sizes_out_of_range_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCache(**values)
