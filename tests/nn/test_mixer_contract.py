"""What every token mixer promises, shown on each configuration of ``mixer_cases``."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from decoder_cases import assert_logits_agree
from nn.mixer_cases import CASES, DIM, KINDS, VOCAB, MixerCase, ids_of
from tolerances import (
    BF16_MODEL,
    DECODER_FLOAT32,
    DECODER_FLOAT64,
    GRADIENT_FLOAT64,
    SPLIT_CPU,
    SPLIT_FLOAT64,
    assert_close,
)
from torch import Tensor, nn

from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.state import DecoderState
from transnormer.nn.norms import Norm
from transnormer.nn.state import KVState, named_tensors, tensors_of

SEQ = 140
# Single tokens, short parts, and parts that end before, at and after multiples of 64.
SPLITS = (
    [1] * 3 + [3] * 4 + [7] * 3 + [SEQ - 36],
    [63, 1, 1, 64, *[1] * 11],
    [65, 62, 1, 12],
    [128, *[1] * 12],
)
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
two_way_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.bidirectional],
    ids=[case.name for case in CASES if case.bidirectional],
)


def in_parts(
    model: Decoder, ids: Tensor, lengths: Sequence[int], state: DecoderState | None = None
) -> tuple[Tensor, DecoderState]:
    """Logits and state of ids given in parts of these lengths."""
    outputs = []
    for part in ids.split(list(lengths), 1):
        out = model(part, state=state)
        outputs.append(out.logits)
        state = out.state
    return torch.cat(outputs, 1), state


def tensors(state: DecoderState) -> list[Tensor]:
    return [x for layer in state.layers for x in tensors_of(layer)]


def assert_states_agree(
    actual: DecoderState, row: int, exact: DecoderState, exact_row: int, limit: float
) -> None:
    """The row of a state holds what another's holds; slots of a cache that are hidden do not count.

    States of other kinds are compared by what the model says next.
    """
    for x, y in zip(actual.layers, exact.layers, strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            assert_close(x[row], y[exact_row], limit=limit, name="state")
        elif isinstance(x, KVState):
            for mine, other in ((x.keys, y.keys), (x.values, y.values)):
                here, there = mine[row][x.valid[row]], other[exact_row][y.valid[exact_row]]
                assert_close(here, there, limit=limit, name="cache")
    assert actual.positions[row] == exact.positions[exact_row]


def assert_continues_alike(
    model: Decoder, actual: DecoderState, row: int, exact: DecoderState, exact_row: int
) -> None:
    """The row of a state holds what another's holds, and the model goes on from it alike."""
    assert_states_agree(actual, row, exact, exact_row, SPLIT_FLOAT64)
    following = ids_of(1, 5, seed=77)
    logits, _ = in_parts(model, following, [2, 1, 1, 1], actual.select([row]))
    wanted, _ = in_parts(model, following, [5], exact.select([exact_row]))
    assert_logits_agree(logits, wanted, SPLIT_FLOAT64)


def watched(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings of ids as a leaf, and the model's logits of them."""
    x = model.embedding(ids).detach().requires_grad_()
    handle = model.embedding.register_forward_hook(lambda *_: x)
    logits = model(ids).logits
    handle.remove()
    return x, logits


def influence(model: Decoder, ids: Tensor, token: int) -> Tensor:
    """Largest gradient of one token's logits by each token's embedding, [seq]."""
    x, logits = watched(model, ids)
    weights = torch.linspace(-1.0, 2.0, VOCAB, dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits[:, token] * weights).sum(), x)
    return gradient.abs().amax((0, 2))


def assert_gradients_agree(actual: Decoder, exact: Decoder, limit: float) -> None:
    """Each parameter's gradient; where it is 0 but for rounding, against the model's largest."""

    def size(x: Tensor | None) -> float:
        return 0.0 if x is None else x.double().square().mean().sqrt().item()

    largest = max(size(x.grad) for x in exact.parameters())
    for (name, x), y in zip(actual.named_parameters(), exact.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if x.grad is not None:
            error = size(x.grad - y.grad) / max(size(y.grad), 0.05 * largest)
            assert error <= limit, f"the gradient of {name} differs by {error:.3g}"


@every_case
def test_no_token_sees_the_future(case: MixerCase) -> None:
    model = case.model(torch.float64)
    ids = ids_of(1, SEQ)
    for token in (0, 63, 64, 100):
        seen = influence(model, ids, token)
        assert bool((seen[token + 1 :] == 0).all()), f"token {token} sees the future"
        assert seen[token] > 0
    # Gradients do not show what flows through a detached value or an argmax.
    changed = ids.clone()
    changed[:, 90:] = (changed[:, 90:] + 1) % VOCAB
    with torch.no_grad():
        assert_logits_agree(model(changed).logits[:, :90], model(ids).logits[:, :90], SPLIT_FLOAT64)


@every_case
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, SPLIT_FLOAT64), (torch.float32, SPLIT_CPU)],
    ids=["float64", "float32"],
)
def test_every_split_gives_the_whole(case: MixerCase, dtype: torch.dtype, limit: float) -> None:
    model = case.model(dtype)
    ids = ids_of(2, SEQ)
    with torch.no_grad():
        whole = model(ids)
        for lengths in SPLITS:
            logits, state = in_parts(model, ids, lengths)
            assert_logits_agree(logits, whole.logits, limit)
            for row in range(2):
                assert_states_agree(state, row, whole.state, row, limit)


@every_case
def test_gradients_flow_through_a_state(case: MixerCase) -> None:
    ids = ids_of(1, 80)
    whole, parts = case.model(torch.float64), case.model(torch.float64)
    whole(ids).logits[:, 40:].square().sum().backward()
    state = parts(ids[:, :40]).state
    assert any(x.requires_grad for x in tensors(state)), "the returned state is detached"
    first = parts(ids[:, 40:70], state=state)
    second = parts(ids[:, 70:71], state=first.state)
    third = parts(ids[:, 71:], state=second.state)
    sum(out.logits.square().sum() for out in (first, second, third)).backward()
    assert_gradients_agree(parts, whole, GRADIENT_FLOAT64)


@every_case
def test_no_state_is_the_empty_state(case: MixerCase) -> None:
    model = case.model(torch.float64)
    for seq in (1, 70):
        ids = ids_of(2, seq)
        with torch.no_grad():
            out, exact = model(ids, state=model.empty_state(2)), model(ids)
        assert_logits_agree(out.logits, exact.logits, SPLIT_FLOAT64)
        assert_states_agree(out.state, 1, exact.state, 1, SPLIT_FLOAT64)


@every_case
def test_a_given_state_is_never_modified(case: MixerCase) -> None:
    model = case.model()
    with torch.no_grad():
        state = model(ids_of(2, 30)).state
        before = state.clone()
        for seq in (1, 70):
            model(ids_of(2, seq, seed=seq), state=state)
    for x, y in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(x, y)


@every_case
def test_an_empty_state_on_meta_has_the_form_of_a_real_one(case: MixerCase) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = case.model(dtype)
        with torch.no_grad():
            real = model(ids_of(3, 20)).state
        empty = model.empty_state(3, device="meta")
        for x, y in zip(empty.layers, real.layers, strict=True):
            assert type(x) is type(y)
            for mine, other in zip(tensors_of(x), tensors_of(y), strict=True):
                assert mine.device.type == "meta"
                assert mine.dtype == other.dtype
                assert mine.dim() == other.dim()
                assert mine.shape[0] == other.shape[0] == 3
                # A cache grows with its length; nothing else does.
                if not hasattr(x, "valid"):
                    assert mine.shape == other.shape
    assert [x.shape[0] for x in tensors(model.empty_state(0))] == [0] * len(tensors(real))


def documents() -> Iterator[tuple[int, Tensor]]:
    """Rows of a packed batch: an empty one and one of a single token among them."""
    for row, length in enumerate((5, 70, 0, 1, 33)):
        yield row, ids_of(1, length, seed=10 + row)


@every_case
def test_packed_sequences_are_as_if_alone(case: MixerCase) -> None:
    model = case.model(torch.float64)
    bounds = torch.tensor([0, 5, 75, 75, 76, 109])
    with torch.no_grad():
        packed = torch.cat([ids for _, ids in documents()], 1)
        first = model(packed, cu_seqlens=bounds)
        # The second time from states, and in another order of lengths.
        again = model(packed.flip(1), cu_seqlens=109 - bounds.flip(0), state=first.state)
        flipped = packed.flip(1).split((109 - bounds.flip(0)).diff().tolist(), 1)
        for row, ids in documents():
            start, stop = bounds[row], bounds[row + 1]
            alone = None if start == stop else model(ids)
            if alone is not None:
                assert_logits_agree(first.logits[:, start:stop], alone.logits, SPLIT_FLOAT64)
                assert_continues_alike(model, first.state, row, alone.state, 0)
            state = model.empty_state(1) if alone is None else alone.state
            if flipped[row].shape[1]:
                more = model(flipped[row], state=state)
                here = slice(109 - bounds.flip(0)[row], 109 - bounds.flip(0)[row + 1])
                assert_logits_agree(again.logits[:, here], more.logits, SPLIT_FLOAT64)
                state = more.state
            assert_continues_alike(model, again.state, row, state, 0)


def masks(seq: int) -> Tensor:
    """Real tokens, [4, seq]: pads on the left, on the right, in the middle, and scattered."""
    token = torch.arange(seq)
    middle = (token < seq - 30) | (token >= seq - 23)
    return torch.stack([token >= 11, token < seq - 11, middle, (token * 7) % 5 != 3])


@every_case
def test_pads_leave_no_trace(case: MixerCase) -> None:
    model = case.model(torch.float64)
    ids, mask = ids_of(4, 90), masks(90)
    # From a state too, where each row meets the pads of another.
    following, more = ids_of(4, 80, seed=6), masks(80).roll(1, 0)
    with torch.no_grad():
        out = model(ids, mask=mask)
        again = model(following, mask=more, state=out.state)
        for row in range(4):
            alone = model(ids[row : row + 1, mask[row]])
            assert_logits_agree(out.logits[row][mask[row]][None], alone.logits, SPLIT_FLOAT64)
            assert_states_agree(out.state, row, alone.state, 0, SPLIT_FLOAT64)
            alone = model(following[row : row + 1, more[row]], state=alone.state)
            assert_logits_agree(again.logits[row][more[row]][None], alone.logits, SPLIT_FLOAT64)
            assert_continues_alike(model, again.state, row, alone.state, 0)


@pytest.mark.parametrize(
    ("case", "causal"),
    [
        pytest.param(case, causal, id=f"{case.name}-{'causal' if causal else 'both_ways'}")
        for case in CASES
        for causal in ((True, False) if case.bidirectional else (True,))
    ],
)
def test_pads_leave_no_trace_whatever_they_hold(case: MixerCase, causal: bool) -> None:
    model = case.model(torch.float64, causal=causal)
    ids, mask = ids_of(4, 40), masks(40)
    found = []
    for value in (0.0, torch.nan, -torch.inf):
        x = model.embedding(ids).detach()
        x[~mask] = value
        model.zero_grad()
        y, state = model.hidden(ids, mask=mask, embeddings=x.requires_grad_())
        y[mask].square().sum().backward()
        weights = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([y[mask], x.grad, *weights, *(tensors(state) if causal else ())])
    for broken in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(broken, found[0], strict=True))


@every_case
def test_pads_of_packed_sequences_leave_no_trace(case: MixerCase) -> None:
    model = case.model(torch.float64)
    ids, bounds = ids_of(1, 80), torch.tensor([0, 0, 15, 80, 80])
    mask = torch.arange(80).remainder(3).ne(1)[None]
    with torch.no_grad():
        first = model(ids, cu_seqlens=bounds, mask=mask)
        both = model(ids, cu_seqlens=bounds, mask=mask, state=first.state)
        for row, (start, stop) in ((1, (0, 15)), (2, (15, 80))):
            real = mask[0, start:stop]
            alone = model(ids[:, start:stop][:, real])
            more = model(ids[:, start:stop][:, real], state=alone.state)
            for out, exact in ((first, alone), (both, more)):
                here = out.logits[:, start:stop][:, real]
                assert_logits_agree(here, exact.logits, SPLIT_FLOAT64)
                assert_continues_alike(model, out.state, row, exact.state, 0)


@every_case
def test_rows_with_different_histories_continue_as_if_alone(case: MixerCase) -> None:
    model = case.model(torch.float64)
    prompts = [ids_of(1, n, seed=20 + n) for n in (3, 70, 18)]
    longest = max(x.shape[1] for x in prompts)
    ids = torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0)) for x in prompts])
    mask = torch.arange(longest)[None] >= torch.tensor([[longest - x.shape[1]] for x in prompts])
    following = ids_of(3, 6, seed=9)
    order = [2, 0, 1, 0]
    with torch.no_grad():
        state = model(ids, mask=mask).state.select(order)
        rows = following[order]
        logits, state = in_parts(model, rows, [1, 4, 1], state)
        for row, prompt in enumerate(order):
            alone = model(torch.cat([prompts[prompt], following[prompt : prompt + 1]], 1))
            assert_logits_agree(logits[row : row + 1], alone.logits[:, -6:], SPLIT_FLOAT64)
            assert_states_agree(state, row, alone.state, 0, SPLIT_FLOAT64)


@every_case
def test_a_masked_step_keeps_a_rows_state(case: MixerCase) -> None:
    model = case.model(torch.float64)
    with torch.no_grad():
        state = model(ids_of(2, 10)).state
        mask = torch.tensor([[True], [False]])
        after = model(ids_of(2, 1), state=state, mask=mask).state
        plain = model(ids_of(2, 1), state=state).state
        assert_continues_alike(model, after, 0, plain, 0)
        assert_continues_alike(model, after, 1, state, 1)
        # A row of pads alone from the start is a row before its first token.
        start = model(ids_of(2, 9), mask=mask.expand(2, 9)).state
        assert_continues_alike(model, start, 1, model.empty_state(1), 0)


@two_way_case
def test_every_token_sees_every_token_of_a_bidirectional_model(case: MixerCase) -> None:
    model = case.model(torch.float64, causal=False)
    ids = ids_of(1, 70)
    for token in (0, 35, 69):
        seen = influence(model, ids, token)
        assert bool(torch.isfinite(seen).all())
        if case.sees_all:
            assert bool((seen > 0).all())
        else:
            assert bool((seen[max(token - 1, 0) : token + 1] > 0).all())
    assert model(ids).state is None


@two_way_case
def test_pads_of_a_bidirectional_model_leave_no_trace(case: MixerCase) -> None:
    model = case.model(torch.float64, causal=False)
    ids, mask = ids_of(4, 70), masks(70)
    with torch.no_grad():
        out = model(ids, mask=mask)
        for row in range(4):
            alone = model(ids[row : row + 1, mask[row]])
            assert_logits_agree(out.logits[row][mask[row]][None], alone.logits, SPLIT_FLOAT64)


@two_way_case
def test_packed_sequences_of_a_bidirectional_model_are_as_if_alone(case: MixerCase) -> None:
    model = case.model(torch.float64, causal=False)
    with torch.no_grad():
        packed = torch.cat([ids for _, ids in documents()], 1)
        bounds = torch.tensor([0, 5, 75, 75, 76, 109])
        logits = model(packed, cu_seqlens=bounds).logits
        exact = torch.cat([model(ids).logits for _, ids in documents() if ids.numel()], 1)
        assert_logits_agree(logits, exact, SPLIT_FLOAT64)


@two_way_case
def test_permuted_tokens_of_a_bidirectional_model(case: MixerCase) -> None:
    model = case.model(torch.float64, causal=False)
    ids, order = ids_of(1, 70), torch.randperm(70)
    with torch.no_grad():
        permuted, plain = model(ids[:, order]).logits, model(ids).logits[:, order]
    error = (permuted - plain).abs().max() / plain.std()
    if case.bidirectional == "equivariant":
        assert error <= SPLIT_FLOAT64
    else:
        assert error > 1e-3


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.bidirectional], ids=lambda case: case.name
)
def test_a_mixer_without_two_directions_says_so(case: MixerCase) -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        case.model(causal=False)


@every_case
def test_bfloat16_model_is_near_the_same_model_in_float32(case: MixerCase) -> None:
    exact = case.model()
    with torch.no_grad():
        for module in exact.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(module.weight.bfloat16())
    model = copy.deepcopy(exact).to(torch.bfloat16)
    ids = ids_of(2, SEQ)
    with torch.no_grad():
        out, wanted = model(ids), exact(ids)
        assert out.logits.dtype == torch.bfloat16
        assert_close(out.logits, wanted.logits.double(), limit=BF16_MODEL)
        for layer in out.state.layers:
            for name, x in named_tensors("state", layer).items():
                # Keys and values of single tokens are a cache, in the activations' dtype.
                cached = name in ("state.keys", "state.values")
                assert cached or not x.is_floating_point() or x.dtype == torch.float32
        logits, _ = in_parts(model, ids, SPLITS[1])
        assert_close(logits, wanted.logits.double(), limit=BF16_MODEL)


@every_case
def test_a_cast_rounds_projections_and_norms_alone(case: MixerCase) -> None:
    # In float64 again, what is left of the cast is which parameters were rounded.
    exact = case.model()
    with torch.no_grad():
        for module in exact.modules():
            projects = isinstance(module, nn.Linear | nn.Embedding | Norm)
            for name, x in module.named_parameters(recurse=False):
                x.mul_(1.0 + 0.05 * torch.randn_like(x))
                if projects or name.endswith(case.rounded or ("-",)):
                    x.copy_(x.bfloat16())
    cast = copy.deepcopy(exact).to(torch.bfloat16).double()
    ids = ids_of(1, 100)
    with torch.no_grad():
        assert_logits_agree(cast(ids).logits, exact.double()(ids).logits, DECODER_FLOAT64)


@every_case
def test_bfloat16_autocast_is_near_float32(case: MixerCase) -> None:
    model = case.model()
    ids = ids_of(2, 100)
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids)
        step = model(ids[:, :1], state=out.state)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(out.logits, exact.logits.double(), limit=BF16_MODEL)
    wanted = model(ids[:, :1], state=exact.state).logits
    assert_close(step.logits, wanted.double(), limit=BF16_MODEL)
    loss.backward()
    for name, x in model.named_parameters():
        assert x.grad is None or bool(torch.isfinite(x.grad).all()), name


@every_case
def test_weights_and_configuration_round_trip(case: MixerCase) -> None:
    model, other = case.model(), case.model(seed=5)
    config = DecoderConfig.model_validate_json(model.config.model_dump_json())
    assert config == model.config
    assert other.fingerprint() != model.fingerprint()
    other.load_state_dict(model.state_dict())
    assert other.fingerprint() == model.fingerprint()
    ids = ids_of(1, 70)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


@every_case
def test_a_bfloat16_model_round_trips_through_a_directory(case: MixerCase, tmp_path: Path) -> None:
    model = case.model()
    checkpoint.save(model, tmp_path / "model")
    rounded = checkpoint.load(tmp_path / "model", dtype=torch.bfloat16)
    model = model.to(torch.bfloat16)
    assert rounded.fingerprint() == model.fingerprint()
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.fingerprint() == model.fingerprint()
    ids = ids_of(1, 70)
    with torch.no_grad():
        # Buffers that are not saved count too, so the outputs are compared.
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_case
def test_state_round_trips_through_a_file(case: MixerCase, tmp_path: Path) -> None:
    model = case.model()
    with torch.no_grad():
        for name, state in (("full", model(ids_of(2, 70)).state), ("empty", model.empty_state(2))):
            state.save(tmp_path / name, model)
            loaded = DecoderState.load(tmp_path / name, model)
            step = ids_of(2, 3, seed=8)
            exact = model(step, state=state).logits
            assert torch.equal(model(step, state=loaded).logits, exact)
            assert [type(x) for x in loaded.layers] == [type(x) for x in state.layers]


@every_case
def test_a_model_made_on_meta_is_reset_to_a_whole_one(case: MixerCase) -> None:
    with torch.device("meta"):
        model = Decoder(case.config())
    out = model(torch.zeros(2, 70, dtype=torch.long, device="meta"))
    assert out.logits.shape == (2, 70, VOCAB)
    model, direct = model.to_empty(device="cpu").eval(), case.model()
    for x in (model, direct):
        torch.manual_seed(3)
        x.reset_parameters()
    # Buffers that are not saved count too, so the outputs are compared.
    ids = ids_of(1, 70)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)


compiled_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.compiles], ids=lambda case: case.name
)
# A constant decay and a gate per key; the others compile in the slow suite.
COMPILED_OFTEN = {"lightning", "hgrn2"}


class Alone(nn.Module):
    """The last mixer of a model with what its kind shares, [batch, seq, DIM] -> the same."""

    def __init__(self, case: MixerCase) -> None:
        super().__init__()
        model = case.model()
        parts, kind = dict(model.shared.items()), case.blocks[-1].token_mixer.kind
        self.mixer, self.part = model.blocks[-1].token_mixer, parts.get(kind)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        shared = None if self.part is None else self.part()
        return self.mixer(x, positions=positions, shared=shared)[0]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=() if c.name in COMPILED_OFTEN else pytest.mark.slow)
        for c in CASES
        if c.compiles
    ],
)
def test_mixer_compiles_whole_and_serves_other_lengths(case: MixerCase) -> None:
    torch._dynamo.reset()
    mixer = Alone(case)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (70, 150):
        x, positions = torch.randn(2, seq, DIM), torch.arange(seq).expand(2, -1)
        results = []
        for function in (mixer, compiled):
            given = x.clone().requires_grad_()
            y = function(given, positions)
            y.square().sum().backward()
            results.append((y, given.grad))
        for exact, actual in zip(*results, strict=True):
            assert_close(actual, exact.double(), limit=DECODER_FLOAT32)


@pytest.mark.slow
@compiled_case
def test_training_compiles_whole(case: MixerCase) -> None:
    torch._dynamo.reset()
    plain, other = case.model(), case.model()
    loss = torch.compile(other.loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (70, 150):
        ids = ids_of(2, seq)
        plain.zero_grad()
        other.zero_grad()
        plain.loss(ids[:, :-1], ids[:, 1:]).backward()
        loss(ids[:, :-1], ids[:, 1:]).backward()
        assert_gradients_agree(other, plain, DECODER_FLOAT32)


@pytest.mark.slow
@compiled_case
def test_steps_compile_whole(case: MixerCase) -> None:
    torch._dynamo.reset()
    model = case.model()
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    ids = ids_of(2, 12)
    with torch.no_grad():
        state = exact = model(ids[:, :9]).state
        for t in range(9, 12):
            out, wanted = (
                step(ids[:, t : t + 1], state=state),
                model(ids[:, t : t + 1], state=exact),
            )
            assert_logits_agree(out.logits, wanted.logits, DECODER_FLOAT32)
            state, exact = out.state, wanted.state


def test_every_kind_is_here_under_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.name.partition("-")[0] for case in CASES} == KINDS
    assert {case.name.partition("-")[0] for case in CASES if case.compiles} == KINDS
