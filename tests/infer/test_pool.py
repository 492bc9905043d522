"""Pools of states: what lies in a slot, taking tokens back, and what a slot costs."""

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config
from tolerances import SPLIT_CPU, relative_error

from transnormer.infer.pool import FixedPool, GrowingPool, make_pool
from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import BlockConfig, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.state import state_bytes
from transnormer.nn.token_mixers import Hgrn2Config, LightningConfig, SoftmaxConfig

GLU = GluConfig(hidden_dim=24)
HYBRID = tnl_config(
    blocks=tuple(
        BlockConfig(token_mixer=mixer, channel_mixer=GLU)
        for mixer in (LightningConfig(heads=2, lrpe=True), SoftmaxConfig(heads=2, kv_heads=1))
    )
)
# A layer that decodes in its slots beside one that does not.
MIXED = tnl_config(
    blocks=tuple(
        BlockConfig(token_mixer=mixer, channel_mixer=GLU)
        for mixer in (LightningConfig(heads=2, lrpe=True), Hgrn2Config(head_dim=8))
    )
)
POOLS = {
    "plain": (tnl_config(), None),
    "ring": (tnl_config(), 16),
    "mixed": (MIXED, None),
    "mixed-ring": (MIXED, 16),
    "growing": (HYBRID, None),
}
# The smallest of a family is its last here.
NAMES = list(reversed(zoo.names()))
pools = pytest.mark.parametrize("case", POOLS.values(), ids=POOLS)
Case = tuple[object, int | None]


def assert_states_agree(actual: DecoderState, exact: DecoderState) -> None:
    assert torch.equal(actual.positions, exact.positions)
    for layer, other in zip(actual.layers, exact.layers, strict=True):
        pairs = [(layer, other)] if isinstance(layer, torch.Tensor) else zip(layer, other)
        assert all(relative_error(a, b) <= SPLIT_CPU for a, b in pairs)


@pools
def test_slots_are_read_and_decoded_apart(case: Case) -> None:
    """Prompts of other lengths in slots 3 and 1, then steps, against each text by itself."""
    model = make_model(case[0])
    pool = make_pool(model, 4, ring=case[1])
    texts = {3: make_ids(1, 11, seed=3)[0], 1: make_ids(1, 16, seed=1)[0]}
    for slot in texts:
        # Others were here before.
        pool.prefill([make_ids(1, 5)[0]], [slot])
        pool.decode(make_ids(1, 1), [slot], rows=2)
        pool.reset(slot)
    logits = pool.prefill([texts[3][:2], texts[1][:7]], [3, 1])
    for row, (slot, length) in enumerate(((3, 2), (1, 7))):
        exact = model(texts[slot][None, :length]).logits[0, -1]
        assert relative_error(logits[row], exact) <= SPLIT_CPU
    for step in range(9):
        ids = torch.stack([texts[1][7 + step : 8 + step], texts[3][2 + step : 3 + step]])
        pool.decode(ids, [1, 3], rows=4)
    for slot, text in texts.items():
        assert_states_agree(pool.read([slot]), model(text[None]).state)
    both = pool.read([1, 3])
    assert both.positions.tolist() == [16, 11]


@pools
def test_verified_tokens_are_kept_or_leave_no_trace(case: Case) -> None:
    model = make_model(case[0])
    pool = make_pool(model, 3, ring=case[1])
    texts = {2: make_ids(1, 9, seed=3)[0], 0: make_ids(1, 5, seed=1)[0]}
    for slot, text in texts.items():
        pool.reset(slot)
        pool.prefill([text], [slot])
    drafts = make_ids(2, 4, seed=8)
    logits = pool.verify(drafts, [2, 0], rows=2)
    for row, slot in enumerate((2, 0)):
        exact = model(torch.cat([texts[slot], drafts[row]])[None]).logits[0, -4:]
        assert relative_error(logits[row], exact) <= SPLIT_CPU
    pool.keep([1, 3])
    for row, (slot, count) in enumerate(((2, 1), (0, 3))):
        text = torch.cat([texts[slot], drafts[row, :count]])
        assert_states_agree(pool.read([slot]), model(text[None]).state)


@pytest.mark.parametrize("case", [POOLS["plain"], POOLS["mixed-ring"]], ids=["plain", "mixed"])
def test_rows_that_are_not_real_leave_no_trace(case: Case) -> None:
    model = make_model(case[0])
    pool = FixedPool(model, 2, ring=case[1])
    for step in range(5):
        pool.decode(make_ids(1, 1, seed=step), [1], rows=8)
    assert pool.positions.tolist() == [0, 5, 0]
    assert_states_agree(pool.read([0, 2]), model.empty_state(2))


def test_a_ring_takes_back_half_of_its_tokens_at_any_time() -> None:
    model = make_model()
    pool = FixedPool(model, 2, ring=16)
    text = make_ids(1, 60)[0]
    pool.prefill([text[:3]], [1])
    for end in range(4, 40):
        pool.decode(text[None, end - 1 : end], [1], rows=2)
        if end % 5 == 0:
            wrong = make_ids(1, 1, seed=end)
            for _ in range(8):
                pool.decode(wrong, [1], rows=2)
            pool.roll_back([1], [8])
    assert_states_agree(pool.read([1]), model(text[None, :39]).state)


def test_a_pool_without_rings_takes_nothing_back() -> None:
    with pytest.raises(NotImplementedError, match="a layer has no ring; expected ring=16"):
        FixedPool(make_model(), 2).roll_back([0], [1])


@pytest.mark.parametrize("mixer", [SoftmaxConfig(heads=2), Hgrn2Config(head_dim=8)])
def test_rings_need_constant_decay(mixer: object) -> None:
    blocks = (BlockConfig(token_mixer=mixer, channel_mixer=GLU),)
    with pytest.raises(NotImplementedError, match="ring is 16; expected None for this model"):
        make_pool(make_model(tnl_config(blocks=blocks)), 2, ring=16)


def test_a_fixed_pool_has_one_size_and_a_growing_one_grows_by_the_token() -> None:
    fixed, growing = make_pool(make_model(), 2), make_pool(make_model(HYBRID), 2)
    cost = ModelCost.of(HYBRID, torch.float32)
    for pool in (fixed, growing):
        before = pool.nbytes
        pool.prefill([make_ids(1, 20)[0]], [1])
        pool.decode(make_ids(1, 1), [1], rows=1)
        grown = 21 * cost.state_bytes_per_token if isinstance(pool, GrowingPool) else 0
        assert pool.nbytes - before == grown


def one_of_each_kind() -> list[str]:
    """Names of the zoo, one for each family and one for each small model; causal ones."""
    names = {name if name.startswith("small") else name.partition("-")[0]: name for name in NAMES}
    return sorted(name for name in names.values() if zoo.get(name).causal)


@pytest.mark.parametrize("name", one_of_each_kind())
def test_every_model_of_the_zoo_has_a_pool_at_its_cost(name: str) -> None:
    config = zoo.get(name, vocab_size=512)
    with torch.device("meta"):
        model = Decoder(config)
    cost = ModelCost.of(config, torch.float32)
    pool = make_pool(model, 3)
    assert isinstance(pool, GrowingPool) == bool(cost.state_bytes_per_token)
    if isinstance(pool, FixedPool):
        # One row beside the slots; positions count with the pool.
        assert sum(map(state_bytes, pool.layers)) == 4 * cost.constant_state_bytes
