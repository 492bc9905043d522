"""What a caller may do wrong while an engine runs: no wrong token, no lost slot, a plain error."""

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config
from engine_cases import GREEDY, alone, assert_all_alone, engine_of, prompts_of

from transnormer.infer.engine import Engine
from transnormer.models.decoder import BlockConfig, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.token_mixers import CosformerConfig, SoftmaxConfig


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


COSFORMER = BlockConfig(token_mixer=CosformerConfig(heads=2, max_positions=12), channel_mixer=None)


@pytest.mark.parametrize(
    ("limit", "mode"),
    [
        ({"max_positions": 12}, {"draft_tokens": 4}),
        ({"max_positions": 12}, {"draft_tokens": 4, "ring": 16}),
        ({"blocks": (COSFORMER,)}, {"draft_tokens": 4}),
    ],
    ids=str,
)
def test_drafts_end_before_the_positions_do(
    limit: dict[str, object], mode: dict[str, object]
) -> None:
    model = make_model(tnl_config(**limit))
    engine = engine_of(model, **mode)
    # The second text stands at the end of the positions while the first may draft.
    prompts = [torch.tensor([1, 2, 1, 2, 1]), torch.tensor([3, 4, 3, 4, 3, 4, 3, 4, 3])]
    requests = [
        engine.submit(prompts[0], max_new_tokens=7, sampling=GREEDY),
        engine.submit(prompts[1], max_new_tokens=3, sampling=GREEDY),
    ]
    engine.run()
    assert_all_alone(model, prompts, requests)


def test_a_prompt_that_changes_after_it_was_given_is_the_one_that_was_given(model: Decoder) -> None:
    prompt = make_ids(1, 20)[0]
    given = prompt.clone()
    request = engine_of(model).submit(prompt, max_new_tokens=5, sampling=GREEDY)
    prompt.fill_(1)
    assert_all_alone(model, [given], [request])


def test_a_step_within_a_step_is_refused(model: Decoder) -> None:
    engine = engine_of(model)
    prompts = prompts_of((2, 5))

    def again(ids: object) -> bool:
        return bool(engine.submit([4], max_new_tokens=2).result())

    broken = engine.submit(prompts[0], max_new_tokens=5, until=again)
    good = engine.submit(prompts[1], max_new_tokens=5, sampling=GREEDY)
    engine.run()
    assert (len(broken.token_ids), broken.finish_reason) == (1, "error")
    with pytest.raises(RuntimeError, match="a step is running; expected one at a time"):
        broken.result()
    assert_all_alone(model, prompts[1:], [good])


@pytest.mark.parametrize("mode", [{}, {"ring": 16}, {"draft_tokens": 3, "ring": 16}], ids=str)
def test_a_step_that_breaks_off_ends_what_ran_and_nothing_else(
    model: Decoder, mode: dict[str, object]
) -> None:
    """An interrupt after the states were advanced: no request goes on from half a step."""
    engine = engine_of(model, slots=2, **mode)
    prompts = prompts_of((5, 4, 9, 12))

    def interrupt(ids: list[int]) -> bool:
        if len(ids) > 1:
            raise KeyboardInterrupt
        return False

    requests = [
        engine.submit(p, max_new_tokens=6, sampling=GREEDY, until=None if i else interrupt)
        for i, p in enumerate(prompts)
    ]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert (engine.running, engine.waiting) == (0, 2)
    for request in requests[:2]:
        with pytest.raises(RuntimeError, match=r"a step broke off with KeyboardInterrupt\(\)"):
            request.result()
    engine.run()
    assert_all_alone(model, prompts[2:], requests[2:])


def test_a_state_is_given_only_where_there_is_one(model: Decoder) -> None:
    """None would start a fork from nothing."""
    engine = engine_of(model, slots=1)
    running = engine.submit([1, 2], max_new_tokens=3, keep_state=True)
    unread = engine.submit([3, 4], max_new_tokens=3, keep_state=True)
    without = engine.submit([3, 4], max_new_tokens=3)
    engine.step()
    message = r"no state \(keep_state is True, finish_reason is None\); expected one that was"
    with pytest.raises(RuntimeError, match=message):
        _ = running.state
    unread.cancel()
    engine.run()
    assert running.state.positions.tolist() == [5]
    with pytest.raises(RuntimeError, match="finish_reason is cancelled"):
        _ = unread.state
    with pytest.raises(RuntimeError, match="keep_state is False"):
        _ = without.state


def test_a_growing_state_leaves_with_its_request() -> None:
    blocks = (BlockConfig(token_mixer=SoftmaxConfig(heads=2), channel_mixer=None),)
    engine = engine_of(make_model(tnl_config(blocks=blocks)))
    before = engine.pool.nbytes
    request = engine.submit(make_ids(1, 30)[0], max_new_tokens=3)
    engine.step()
    assert engine.pool.nbytes > before
    request.result()
    assert engine.pool.nbytes == before


def test_a_state_that_no_model_made_is_refused_before_others_run_beside_it() -> None:
    blocks = (BlockConfig(token_mixer=SoftmaxConfig(heads=2), channel_mixer=None),)
    model = make_model(tnl_config(blocks=blocks))
    engine, state = engine_of(model), model(make_ids(1, 4)).state
    cache = state.layers[0]
    short = state._replace(layers=(cache._replace(keys=cache.keys[:, :2]),))
    with pytest.raises(ValueError, match=r"state.layers\[0\] has fields of \[2, 4, 4\] tokens"):
        engine.submit([1], max_new_tokens=1, state=short)
    for positions in (torch.tensor([[3]]), torch.tensor([-3])):
        bad = state._replace(positions=positions)
        with pytest.raises(ValueError, match="expected one number of at least 0"):
            engine.submit([1], max_new_tokens=1, state=bad)
    assert engine.waiting == 0


def test_arguments_of_another_type_are_named(model: Decoder) -> None:
    engine = engine_of(model)
    with pytest.raises(ValueError, match="prompt is empty; expected at least one token"):
        engine.submit([], max_new_tokens=1)
    with pytest.raises(TypeError, match="sampling is a dict; expected a SamplingConfig"):
        engine.submit([1], max_new_tokens=1, sampling={"top_k": 3})
    with pytest.raises(TypeError, match="state is a Request; expected a DecoderState or None"):
        engine.submit([1], max_new_tokens=1, state=engine.submit([1], max_new_tokens=0))
    with pytest.raises(TypeError, match="draw_below is 2.5; expected an integer"):
        Engine(model, draw_below=2.5)
    unsigned = torch.tensor([1, 2], dtype=torch.uint16)
    exact = alone(model, torch.tensor([1, 2]), 3, temperature=0.0)
    assert engine.submit(unsigned, max_new_tokens=3, sampling=GREEDY).result() == exact


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_cache_of_too_few_dims_is_refused(shape: tuple[int, ...]) -> None:
    block = BlockConfig(token_mixer=SoftmaxConfig(heads=2), channel_mixer=None)
    model = make_model(tnl_config(blocks=(block,)))
    state = model.empty_state(1)
    cache = state.layers[0]._replace(valid=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"state.layers\[0\] has shape"):
        engine_of(model).submit(
            [1, 2], max_new_tokens=1, state=DecoderState((cache,), state.positions)
        )
