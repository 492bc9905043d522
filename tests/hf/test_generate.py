"""transformers' ``generate`` on decoders, beside this package's own and beside whole passes."""

from typing import Any

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, tnl_config
from hf_cases import PAD, hybrid_config, pair
from tolerances import SPLIT_CPU
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer

from transnormer.hf import DecoderCache, StaticDecoderCache
from transnormer.infer.generate import generate
from transnormer.models.decoder import Decoder

Pair = tuple[Decoder, PreTrainedModel]
NEW = 8


@pytest.fixture(scope="module", params=["tnl", "hybrid"])
def models(request: pytest.FixtureRequest) -> Pair:
    """A TransNormerLLM, and a hybrid with softmax layers."""
    return pair(tnl_config() if request.param == "tnl" else hybrid_config())


@pytest.fixture(scope="module")
def tnl() -> Pair:
    return pair(tnl_config())


def greedy(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """``NEW`` tokens by transformers; ends of text do not stop it."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | options
    return model.generate(ids, **options)


def ours(model: Decoder, ids: Tensor | list[Tensor], count: int = NEW) -> Tensor:
    """Greedy tokens by this package, [batch, count]."""
    generation = generate(model, ids, max_new_tokens=count, temperature=0)
    list(generation)
    return torch.tensor(generation.token_ids)


def test_greedy_tokens_are_those_of_this_package(models: Pair) -> None:
    ids = make_ids(3, 11)
    assert torch.equal(greedy(models[1], ids)[:, 11:], ours(models[0], ids))


def test_greedy_without_a_cache_gives_the_same(models: Pair) -> None:
    ids = make_ids(2, 7)
    assert torch.equal(greedy(models[1], ids, use_cache=False), greedy(models[1], ids))


def left_padded(lengths: tuple[int, ...], width: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of several lengths, alone and as a left-padded batch with its mask."""
    rows = [make_ids(1, n, seed=n)[0] for n in lengths]
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(rows):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return rows, ids, mask


def test_left_pads_change_nothing(models: Pair) -> None:
    rows, ids, mask = left_padded((3, 9, 12), 14)
    found = greedy(models[1], ids, attention_mask=mask)[:, 14:]
    assert torch.equal(found, ours(models[0], rows))


def test_right_pads_leave_no_trace_in_the_cache(models: Pair) -> None:
    model, wrapped = models
    ids = make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        cache = wrapped(ids, attention_mask=mask).past_key_values
        assert cache.state.positions.tolist() == [6, 9]
        exact = model(torch.cat([ids[:1, :6], ids[:1, :3]], 1)).logits[:, -3:]
        found = wrapped(ids[:, :3], past_key_values=cache).logits[:1]
    assert_logits_agree(found, exact, SPLIT_CPU)


def test_sampled_tokens_come_from_the_logits_of_the_whole_sequence(models: Pair) -> None:
    torch.manual_seed(3)
    out = greedy(
        models[1],
        make_ids(2, 6),
        do_sample=True,
        temperature=0.7,
        top_k=0,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (6, 6 + NEW)
    assert len(torch.unique(out.sequences, dim=0)) == 6
    with torch.no_grad():
        exact = models[0](out.sequences[:, :-1]).logits[:, 5:]
    assert_logits_agree(torch.stack(out.logits, 1), exact, SPLIT_CPU)


def test_beams_are_those_of_whole_passes(models: Pair) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    options["output_scores"] = True
    rows, ids, mask = left_padded((4, 7), 7)
    found = greedy(models[1], ids, attention_mask=mask, **options)
    exact = greedy(models[1], ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(found.sequences, exact.sequences)
    torch.testing.assert_close(found.sequences_scores, exact.sequences_scores)
    assert len(rows) * 2 == found.sequences.shape[0]


def test_a_conversation_goes_on_from_its_cache(models: Pair) -> None:
    ids, more = make_ids(2, 5), make_ids(2, 4, seed=9)
    first = greedy(models[1], ids, return_dict_in_generate=True)
    asked = torch.cat([first.sequences, more], 1)
    cache = first.past_key_values
    # The last token drawn has not been read.
    assert cache.get_seq_length() == 5 + NEW - 1
    found = greedy(models[1], asked, past_key_values=cache)
    assert torch.equal(found, greedy(models[1], asked))


@pytest.mark.parametrize("given", ["whole", "new", "none"])
def test_a_conversation_of_padded_rows_goes_on_from_its_cache(models: Pair, given: str) -> None:
    rows, ids, mask = left_padded((3, 6), 6)
    first = greedy(models[1], ids, attention_mask=mask, return_dict_in_generate=True)
    more = make_ids(2, 4, seed=9)
    asked = torch.cat([first.sequences, more], 1)
    whole = torch.cat([mask, torch.ones(2, asked.shape[1] - 6, dtype=mask.dtype)], 1)
    # The new tokens alone come with the mask of everything, as transformers wants it.
    unread = asked[:, first.past_key_values.get_seq_length() :]
    ids = unread if given == "new" else asked
    options = {} if given == "none" else {"attention_mask": whole}
    found = greedy(models[1], ids, past_key_values=first.past_key_values, **options)
    alone = [torch.cat([row, asked[i, 6:]]) for i, row in enumerate(rows)]
    assert torch.equal(found[:, ids.shape[1] :], ours(models[0], alone))


@pytest.mark.parametrize("size", [1, 4, 64])
def test_prefill_in_chunks_gives_the_same(models: Pair, size: int) -> None:
    rows, ids, mask = left_padded((4, 11), 11)
    found = greedy(models[1], ids, attention_mask=mask, prefill_chunk_size=size)
    assert torch.equal(found[:, 11:], ours(models[0], rows))


def test_generation_from_embeddings_gives_the_same(models: Pair) -> None:
    ids = make_ids(2, 6)
    embeddings = models[1].get_input_embeddings()(ids)
    found = models[1].generate(
        inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD
    )
    assert torch.equal(found, greedy(models[1], ids)[:, 6:])


class Pieces:
    """A tokenizer as far as a streamer needs one."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f"{i} " for i in ids)


def test_a_streamer_gets_every_token(tnl: Pair) -> None:
    ids = make_ids(1, 5)
    streamer = TextIteratorStreamer(Pieces(), skip_prompt=True, timeout=10)
    found = greedy(tnl[1], ids, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in found[0, 5:].tolist()]


def test_prompt_lookup_never_changes_greedy_tokens(models: Pair) -> None:
    # A prompt that repeats itself, so that some candidates are accepted.
    ids = make_ids(1, 6).repeat(1, 3)
    found = greedy(models[1], ids, max_new_tokens=40, prompt_lookup_num_tokens=4)
    assert torch.equal(found, greedy(models[1], ids, max_new_tokens=40))


@pytest.mark.parametrize("alike", [True, False])
def test_an_assistant_never_changes_greedy_tokens(models: Pair, alike: bool) -> None:
    # One assistant is always right, one never by more than chance.
    assistant = models[1] if alike else pair(tnl_config(init_std=0.1))[1]
    ids = make_ids(1, 6)
    found = greedy(models[1], ids, max_new_tokens=40, assistant_model=assistant)
    assert torch.equal(found, greedy(models[1], ids, max_new_tokens=40))


def test_a_step_of_assisted_decoding_is_one_call(
    models: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An assistant with the same weights: each of its five drafts is right.
    assistant = pair(models[0].config)[1]
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = []
    hidden = models[1].transnormer.hidden
    monkeypatch.setattr(
        models[1].transnormer, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k)
    )
    ids = make_ids(1, 6)
    found = greedy(models[1], ids, max_new_tokens=60, assistant_model=assistant)
    assert found.shape == (1, 66)
    assert len(calls) == 10


def test_a_static_cache_gives_the_same(tnl: Pair) -> None:
    ids = make_ids(3, 9)
    plain = greedy(tnl[1], ids)
    assert torch.equal(greedy(tnl[1], ids, cache_implementation="static"), plain)
    beams = greedy(tnl[1], ids, cache_implementation="static", num_beams=3)
    assert torch.equal(beams, greedy(tnl[1], ids, num_beams=3))


def test_a_static_cache_of_a_growing_state_is_refused() -> None:
    _, wrapped = pair(hybrid_config())
    with pytest.raises(NotImplementedError, match="layer 1 grows with the text"):
        greedy(wrapped, make_ids(1, 4), cache_implementation="static")


@pytest.mark.slow
def test_one_compiled_graph_serves_all_steps(tnl: Pair) -> None:
    _, wrapped = tnl
    ids = make_ids(2, 9)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    cache = StaticDecoderCache(wrapped.transnormer.empty_state(2))
    step = torch.compile(wrapped.forward, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        logits = wrapped(ids, past_key_values=cache, logits_to_keep=1).logits
        drawn = []
        for index in range(NEW):
            drawn.append(logits[:, -1].argmax(-1, keepdim=True))
            where = torch.full((2, 1), 9 + index)
            logits = step(drawn[-1], past_key_values=cache, position_ids=where).logits
    assert torch.equal(torch.cat(drawn, 1), greedy(wrapped, ids)[:, 9:])
    assert len(graphs) == 1


@pytest.mark.slow
def test_generate_compiles_its_steps(tnl: Pair) -> None:
    from transformers import CompileConfig

    options = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    ids = make_ids(2, 9)
    found = greedy(tnl[1], ids, cache_implementation="static", compile_config=options)
    assert torch.equal(found, greedy(tnl[1], ids))


def test_another_cache_is_refused(tnl: Pair) -> None:
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache"):
        tnl[1](make_ids(1, 3), past_key_values=DynamicCache())


def test_rolling_back_needs_the_past_to_be_kept(tnl: Pair) -> None:
    cache = DecoderCache()
    with torch.no_grad():
        tnl[1](make_ids(1, 5), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("cuts", [(1, 2), (3, 1, 4), (7,)])
def test_reading_on_after_a_cut_is_as_if_it_had_not_been_read(
    models: Pair, cuts: tuple[int, ...]
) -> None:
    model, wrapped = models
    cache = DecoderCache()
    cache.activate_past_recording()
    kept = make_ids(2, 0)
    with torch.no_grad():
        for index, cut in enumerate(cuts):
            ids = make_ids(2, 9, seed=20 + index)
            found = wrapped(ids, past_key_values=cache).logits
            exact = model(torch.cat([kept, ids], 1)).logits[:, -9:]
            assert_logits_agree(found, exact, SPLIT_CPU)
            cache.crop(-cut)
            kept = torch.cat([kept, ids[:, : 9 - cut]], 1)
            assert cache.get_seq_length() == kept.shape[1]


def test_a_cut_may_go_back_over_several_steps(tnl: Pair) -> None:
    model, wrapped = tnl
    ids = make_ids(1, 12)
    cache = DecoderCache()
    with torch.no_grad():
        wrapped(ids[:, :6], past_key_values=cache)
        cache.activate_past_recording()
        for index in range(6, 12):
            wrapped(ids[:, index : index + 1], past_key_values=cache)
        cache.crop(-4)
        found = wrapped(ids[:, :3], past_key_values=cache).logits
        exact = model(torch.cat([ids[:, :8], ids[:, :3]], 1)).logits[:, -3:]
    assert_logits_agree(found, exact, SPLIT_CPU)
    with pytest.raises(RuntimeError, match="goes back to token 2"):
        cache.crop(-9)


def test_a_state_of_this_package_goes_on_in_transformers_and_back(models: Pair) -> None:
    model, wrapped = models
    ids = make_ids(2, 9)
    with torch.no_grad():
        state = model(ids[:, :-1]).state
    cache = DecoderCache(state)
    assert cache.get_seq_length() == 8
    out = greedy(wrapped, ids, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, 9:], ours(model, ids))
    # The last token drawn has not been read.
    last = out.sequences[:, -1:]
    generation = generate(
        model, last, max_new_tokens=3, temperature=0, state=out.past_key_values.state
    )
    list(generation)
    exact = ours(model, ids, NEW + 3)[:, NEW:]
    assert torch.equal(torch.tensor(generation.token_ids), exact)
