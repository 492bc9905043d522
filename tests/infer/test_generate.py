"""Generation: tokens, states and reasons are right at every point, for every row."""

import itertools

import pytest
import torch
from decoder_cases import VOCAB, assert_logits_agree, make_ids, make_model, tnl_config
from tolerances import SPLIT_CPU, relative_error
from torch import Tensor

from transnormer.infer import generate as generate_module
from transnormer.infer.generate import generate
from transnormer.models.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model without special ids."""
    return make_model()


def ragged() -> list[Tensor]:
    """Prompts of 5, 1 and 9 tokens."""
    return [make_ids(1, length, seed=length)[0] for length in (5, 1, 9)]


def greedy_by_forward(model: Decoder, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation without any state: the whole text is read anew for each token."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_the_full_forward(model: Decoder) -> None:
    prompts = make_ids(3, 6)
    generation = generate(model, prompts, max_new_tokens=8, temperature=0.0)
    steps = list(generation)
    assert all(tokens.shape == (3,) and tokens.dtype == torch.int64 for tokens in steps)
    expected = [greedy_by_forward(model, prompt, 8) for prompt in prompts]
    assert generation.token_ids == expected
    assert torch.stack(steps, 1).tolist() == expected


def test_ragged_prompts_generate_as_alone(model: Decoder) -> None:
    together = generate(model, ragged(), max_new_tokens=7, temperature=0.0)
    assert len(list(together)) == 7
    for row, prompt in enumerate(ragged()):
        assert together.token_ids[row] == greedy_by_forward(model, prompt, 7)


def test_ragged_prompts_are_read_in_one_packed_call(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = model.forward

    def watch(input_ids: Tensor, **options: object) -> object:
        calls.append((list(input_ids.shape), options["cu_seqlens"]))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", watch)
    generate(model, ragged(), max_new_tokens=1)
    assert [shape for shape, _ in calls] == [[1, 15]]
    assert calls[0][1].tolist() == [0, 5, 6, 15]


def assert_state_is_that_of(model: Decoder, state: object, row: int, ids: list[int]) -> None:
    """Compare one row of a state with that of a full forward over ids."""
    expected = model(torch.tensor([ids])).state
    assert state.positions[row] == len(ids)
    for layer, exact in zip(state.layers, expected.layers, strict=True):
        assert relative_error(layer[row : row + 1], exact) <= SPLIT_CPU


@pytest.mark.parametrize("taken", [0, 1, 3, 6])
def test_the_state_is_after_everything_yielded_at_any_point(model: Decoder, taken: int) -> None:
    prompts = ragged()
    generation = generate(model, prompts, max_new_tokens=6, seed=3)
    for _ in itertools.islice(generation, taken):
        pass
    for row, prompt in enumerate(prompts):
        assert len(generation.token_ids[row]) == taken
        ids = prompt.tolist() + generation.token_ids[row]
        assert_state_is_that_of(model, generation.state, row, ids)


def test_asking_for_the_state_changes_no_token(model: Decoder) -> None:
    plain = generate(model, ragged(), max_new_tokens=6, seed=3)
    curious = generate(model, ragged(), max_new_tokens=6, seed=3)
    for a, b in zip(plain, curious, strict=True):
        assert torch.equal(a, b)
        assert curious.state.positions is not None


def test_generation_goes_on_from_a_state(model: Decoder) -> None:
    whole = make_ids(2, 12)
    first = generate(model, whole[:, :5], max_new_tokens=0)
    assert list(first) == []
    assert first.finish_reasons == ["length", "length"]
    layers = [layer.clone() for layer in first.state.layers]
    second = generate(model, whole[:, 5:], max_new_tokens=4, temperature=0.0, state=first.state)
    straight = generate(model, whole, max_new_tokens=4, temperature=0.0)
    assert [t.tolist() for t in second] == [t.tolist() for t in straight]
    assert all(torch.equal(a, b) for a, b in zip(layers, first.state.layers, strict=True))
    assert second.state.positions.tolist() == [16, 16]


def test_ragged_turns_go_on_from_a_state(model: Decoder) -> None:
    first = generate(model, ragged(), max_new_tokens=2, seed=1)
    list(first)
    turns = [make_ids(1, length, seed=20 + length)[0] for length in (3, 4, 2)]
    second = generate(model, turns, max_new_tokens=5, temperature=0.0, state=first.state)
    list(second)
    for row, prompt in enumerate(ragged()):
        text = torch.cat([prompt, torch.tensor(first.token_ids[row]), turns[row]])
        assert second.token_ids[row] == greedy_by_forward(model, text, 5)


def test_a_long_prompt_is_read_in_pieces(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_ids(2, 50)
    whole = generate(model, prompts, max_new_tokens=3, temperature=0.0)
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 14)
    pieces = generate(model, prompts, max_new_tokens=3, temperature=0.0)
    assert_logits_agree(pieces._logits, whole._logits, SPLIT_CPU)
    assert [t.tolist() for t in pieces] == [t.tolist() for t in whole]


def test_a_rows_draws_depend_on_seed_and_row_alone(model: Decoder) -> None:
    prompts = make_ids(3, 4)
    batch = generate(model, prompts, max_new_tokens=10, seed=5)
    list(batch)
    alone = generate(model, prompts[:1], max_new_tokens=10, seed=5)
    list(alone)
    other = generate(model, [prompts[0], make_ids(1, 9)[0]], max_new_tokens=10, seed=5)
    list(other)
    assert batch.token_ids[0] == alone.token_ids[0] == other.token_ids[0]
    same_prompt = generate(model, prompts[:1].expand(2, -1), max_new_tokens=10, seed=5)
    list(same_prompt)
    assert same_prompt.token_ids[0] != same_prompt.token_ids[1]


def test_no_seed_takes_one_from_torch(model: Decoder) -> None:
    def tokens() -> list[list[int]]:
        generation = generate(model, make_ids(1, 3), max_new_tokens=12)
        list(generation)
        return generation.token_ids

    torch.manual_seed(4)
    first, second = tokens(), tokens()
    torch.manual_seed(4)
    assert tokens() == first != second


def test_rows_stop_alone_and_leave_no_trace(model: Decoder) -> None:
    prompts = ragged()
    free = generate(model, prompts, max_new_tokens=9, temperature=0.0)
    list(free)
    stop = free.token_ids[0][3]
    generation = generate(model, prompts, max_new_tokens=9, temperature=0.0, stop=[stop])
    steps = torch.stack(list(generation), 1).tolist()
    for row, ids in enumerate(free.token_ids):
        end = ids.index(stop) + 1 if stop in ids else 9
        assert generation.token_ids[row] == ids[:end]
        assert steps[row] == (ids[:end] + [-1] * 9)[: len(steps[row])]
        assert generation.finish_reasons[row] == ("stop" if stop in ids else "length")
        text = prompts[row].tolist() + ids[:end]
        assert_state_is_that_of(model, generation.state, row, text)
    assert "stop" in generation.finish_reasons
    assert "length" in generation.finish_reasons


def test_a_stop_may_be_a_sequence(model: Decoder) -> None:
    free = generate(model, make_ids(1, 4), max_new_tokens=8, seed=2)
    list(free)
    ids = free.token_ids[0]
    stops = [[ids[2], ids[2] + 1 if ids[2] + 1 != ids[3] else 0], ids[2:5]]
    generation = generate(model, make_ids(1, 4), max_new_tokens=8, seed=2, stop=stops)
    list(generation)
    assert generation.token_ids == [ids[:5]]
    assert generation.finish_reasons == ["stop"]


def test_the_prompt_is_no_part_of_a_stop(model: Decoder) -> None:
    prompt = make_ids(1, 4)
    free = generate(model, prompt, max_new_tokens=4, seed=2)
    list(free)
    stop = [[int(prompt[0, -1]), free.token_ids[0][0]]]
    generation = generate(model, prompt, max_new_tokens=4, seed=2, stop=stop)
    list(generation)
    assert generation.token_ids == free.token_ids


def test_the_config_says_where_a_text_ends() -> None:
    free = generate(make_model(), make_ids(1, 4), max_new_tokens=6, seed=2)
    list(free)
    eos = free.token_ids[0][2]
    model = make_model(tnl_config(eos_token_id=eos))
    ended = generate(model, make_ids(1, 4), max_new_tokens=6, seed=2)
    list(ended)
    assert ended.token_ids[0] == free.token_ids[0][: free.token_ids[0].index(eos) + 1]
    endless = generate(model, make_ids(1, 4), max_new_tokens=6, seed=2, stop=[])
    list(endless)
    assert endless.token_ids == free.token_ids


def test_reasons_are_none_while_a_row_runs(model: Decoder) -> None:
    generation = generate(model, make_ids(2, 3), max_new_tokens=2)
    assert generation.finish_reasons == [None, None]
    next(generation)
    assert generation.finish_reasons == [None, None]
    next(generation)
    assert generation.finish_reasons == ["length", "length"]
    with pytest.raises(StopIteration):
        next(generation)


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = make_model(tnl_config(dropout=0.5))
    expected = greedy_by_forward(model, make_ids(1, 4)[0], 5)
    model.train()
    generation = generate(model, make_ids(1, 4), max_new_tokens=5, temperature=0.0)
    list(generation)
    assert model.training
    assert generation.token_ids == [expected]


ONE = torch.tensor([[1, 2]])
BAD = {
    "id beyond": (
        {"input_ids": torch.tensor([[1, VOCAB]])},
        rf"input_ids\[0\] holds the id {VOCAB}",
    ),
    "negative id": (
        {"input_ids": [torch.tensor([1]), torch.tensor([-1])]},
        r"input_ids\[1\] holds",
    ),
    "empty prompt": (
        {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
        r"input_ids\[0\] is empty",
    ),
    "empty row": (
        {"input_ids": [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]},
        r"input_ids\[1\] is empty; expected at least one token",
    ),
    "no prompts": ({"input_ids": []}, "input_ids holds no prompts"),
    "one dim": ({"input_ids": torch.tensor([1, 2])}, r"shape \[2\]; expected \[batch, seq\]"),
    "matrix in a list": (
        {"input_ids": [ONE]},
        r"input_ids\[0\] has shape \[1, 2\]; expected \[seq\]",
    ),
    "temperature": ({"temperature": -0.5}, r"temperature is -0\.5"),
    "top_k": ({"top_k": 0}, "top_k is 0"),
    "top_p": ({"top_p": 2.0}, r"top_p is 2\.0"),
    "seed": ({"seed": -3}, "seed is -3"),
    "max_new_tokens": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "stop beyond": ({"stop": [VOCAB]}, r"stop\[0\] is \[61\]; expected ids below 61"),
    "empty stop": ({"stop": [[]]}, r"stop\[0\] is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line(model: Decoder, name: str) -> None:
    changes, message = BAD[name]
    arguments = {"input_ids": ONE, "max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, arguments.pop("input_ids"), **arguments)
    assert "\n" not in str(caught.value)


def test_types_that_are_no_prompts_are_refused(model: Decoder) -> None:
    with pytest.raises(TypeError, match=r"dtype torch\.float32; expected an integer dtype"):
        generate(model, torch.zeros(1, 2), max_new_tokens=1)
    with pytest.raises(TypeError, match=r"input_ids\[0\] is a list; expected a tensor"):
        generate(model, [[1, 2]], max_new_tokens=1)
    with pytest.raises(TypeError, match=r"stop\[0\] is \('e', 'n', 'd'\); expected integers"):
        generate(model, ONE, max_new_tokens=1, stop=["end"])
    with pytest.raises(TypeError, match=r"max_new_tokens is 1\.5"):
        generate(model, ONE, max_new_tokens=1.5)


def test_a_state_of_another_batch_is_refused(model: Decoder) -> None:
    state = model(make_ids(2, 3)).state
    with pytest.raises(ValueError, match="state has 2 rows; expected 1"):
        generate(model, ONE, max_new_tokens=1, state=state)


def test_a_bidirectional_model_does_not_generate() -> None:
    with pytest.raises(ValueError, match=r"config\.causal is False"):
        generate(make_model(tnl_config(causal=False)), ONE, max_new_tokens=1)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 20}, {"top_p": 0.9}])
def test_ids_from_a_limit_on_are_never_drawn(model: Decoder, sampling: dict[str, float]) -> None:
    prompts = ragged()
    generation = generate(model, prompts, max_new_tokens=12, seed=1, **sampling)
    generation.draw_below(5)
    list(generation)
    assert all(len(ids) == 12 and max(ids) < 5 for ids in generation.token_ids)
    if "temperature" in sampling:
        first = [int(model(prompt[None]).logits[0, -1, :5].argmax()) for prompt in prompts]
        assert [ids[0] for ids in generation.token_ids] == first
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        generation.draw_below(0)


@pytest.mark.parametrize(
    "argument",
    [{"seed": 1.5}, {"seed": True}, {"temperature": "1"}, {"top_k": "3"}, {"top_p": True}],
    ids=str,
)
def test_an_argument_of_another_type_is_a_type_error(argument: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(argument))):
        generate(make_model(), make_ids(1, 3), max_new_tokens=1, **argument)
