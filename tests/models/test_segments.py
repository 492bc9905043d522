"""Gradients segment by segment: equal to the whole sequence's, with the memory of one segment."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from decoder_cases import VOCAB, adapted, make_ids, make_model, tnl_config
from nn.mixer_cases import CASES, MixerCase
from nn.mixer_cases import VOCAB as CASE_VOCAB
from tolerances import SEGMENTS
from torch import Tensor

from transnormer.models.decoder import Decoder
from transnormer.models.segments import backward_in_segments
from transnormer.ops import linear_cross_entropy

GROWING = {"gau-quad", "softmax", "softmax-no-positions", "softmax-hybrid"}
CONSTANT = [case for case in CASES if case.name not in GROWING]
# Documents of 0 to 39 tokens; of segments of 16, they cross three borders and end at one.
BOUNDS = torch.tensor([0, 5, 5, 32, 71, 82], dtype=torch.int32)


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def whole(model: Decoder, ids: Tensor, labels: Tensor, bounds: Tensor | None = None):
    loss = model.loss(ids, labels, reduction="sum", cu_seqlens=bounds)
    (loss / 7).backward()
    return loss.item(), gradients(model)


def assert_same(found, wanted) -> None:
    assert abs(found[0] - wanted[0]) <= SEGMENTS * abs(wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, exact in wanted[1].items():
        difference = (found[1][name] - exact).norm().item()
        assert difference <= SEGMENTS * exact.norm().item(), name


def in_segments(model: Decoder, ids: Tensor, labels: Tensor, tokens: int, bounds=None):
    loss = backward_in_segments(
        model, ids, labels, segment_tokens=tokens, cu_seqlens=bounds, divisor=7
    )
    return loss.item(), gradients(model)


def example(vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    ids, labels = make_ids(2, 41) % vocab, make_ids(2, 41, seed=3) % vocab
    labels[0, 3] = labels[1, 30:] = -100
    return ids, labels


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("case", CONSTANT, ids=[case.name for case in CONSTANT])
def test_every_mixer_gives_the_whole_gradient(case: MixerCase, packed: bool) -> None:
    model = case.model(torch.float64)
    ids, labels = example(CASE_VOCAB)
    bounds = BOUNDS if packed else None
    if packed:
        ids, labels = ids.view(1, -1), labels.view(1, -1)
    assert_same(in_segments(model, ids, labels, 16, bounds), whole(model, ids, labels, bounds))


@pytest.mark.parametrize("tokens", [1, 3, 40, 41, 1000])
def test_every_length_of_segments_gives_the_whole_gradient(tokens: int) -> None:
    model = make_model(dtype=torch.float64)
    ids, labels = example()
    assert_same(in_segments(model, ids, labels, tokens), whole(model, ids, labels))
    ids, labels = ids.view(1, -1), labels.view(1, -1)
    assert_same(in_segments(model, ids, labels, tokens, BOUNDS), whole(model, ids, labels, BOUNDS))


def test_an_untied_head_and_learned_positions_too() -> None:
    model = make_model(tnl_config(tie_embeddings=False, max_positions=50), torch.float64)
    ids, labels = example()
    assert_same(in_segments(model, ids, labels, 16), whole(model, ids, labels))


def test_gradients_add_up_over_calls() -> None:
    model = make_model(dtype=torch.float64)
    ids, labels = example()
    total = sum(
        backward_in_segments(
            model, ids[i : i + 1], labels[i : i + 1], segment_tokens=16, divisor=7
        ).item()
        for i in range(2)
    )
    assert_same((total, gradients(model)), whole(model, ids, labels))


def test_a_segment_without_labels_still_carries_the_gradient() -> None:
    model = make_model(dtype=torch.float64)
    ids, labels = example()
    labels[:, 16:32] = -100
    assert_same(in_segments(model, ids, labels, 16), whole(model, ids, labels))


@pytest.mark.parametrize("where", ["model", "adapters"])
def test_dropout_repeats_its_masks(where: str) -> None:
    model = adapted() if where == "adapters" else make_model(tnl_config(dropout=0.3), torch.float64)
    model.train()
    ids, labels = example()
    torch.manual_seed(5)
    state, total = model.empty_state(2), torch.zeros(())
    for start in (0, 16, 32):
        x, state = model.hidden(ids[:, start : start + 16], state)
        part = labels[:, start : start + 16].flatten()
        total = total + linear_cross_entropy(x.flatten(0, 1), model.head_weight, part).sum()
    (total / 7).backward()
    wanted, after = (total.item(), gradients(model)), torch.rand(3)
    torch.manual_seed(5)
    assert_same(in_segments(model, ids, labels, 16), wanted)
    # What follows draws the same numbers as after one forward pass.
    assert torch.equal(torch.rand(3), after)


def test_an_autocast_around_the_call_keeps_its_gradients() -> None:
    model = make_model()
    ids, labels = example()
    inside = {}
    for outer in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16) if outer else nullcontext():
            backward_in_segments(
                model,
                ids,
                labels,
                segment_tokens=16,
                context=nullcontext
                if outer
                else lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            )
        inside[outer] = gradients(model)
    assert inside[True].keys() == inside[False].keys() == dict(model.named_parameters()).keys()


class Kept:
    """A tensor that autograd keeps, counted while it lives."""

    live, peak = 0, 0

    def __init__(self, x: Tensor) -> None:
        self.x, self.bytes = x, x.nbytes
        Kept.live += self.bytes
        Kept.peak = max(Kept.peak, Kept.live)

    def __del__(self) -> None:
        Kept.live -= self.bytes


@contextmanager
def counted(model: Decoder) -> Iterator[None]:
    """Count what is kept for backward passes beside parameters."""
    Kept.live = Kept.peak = 0
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor | Kept:
        return x if x.untyped_storage().data_ptr() in own else Kept(x)

    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept.x if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def test_activations_are_those_of_one_segment() -> None:
    model = make_model()
    peaks = {}
    for segments in (1, 2, 8):
        ids = make_ids(1, 32 * segments)
        with counted(model):
            backward_in_segments(model, ids, ids, segment_tokens=32)
        peaks[segments] = Kept.peak
        assert Kept.live == 0
    assert peaks[8] == peaks[2] <= 1.05 * peaks[1]
    with counted(model):
        model.loss(ids, ids).backward()
    assert Kept.peak > 6 * peaks[8]


@pytest.mark.parametrize("name", sorted(GROWING))
def test_states_that_grow_are_refused(name: str) -> None:
    model = next(case for case in CASES if case.name == name).model()
    ids = make_ids(1, 8) % CASE_VOCAB
    with pytest.raises(NotImplementedError, match=r"whose state holds every token read so far"):
        backward_in_segments(model, ids, ids, segment_tokens=4)


@pytest.mark.parametrize("bounds", [[2, 8], [0, 4], [0, 4, 12], [0, 5, 3, 8], [0, -1, 8]])
def test_bounds_that_do_not_fit_the_row_are_refused(bounds: list[int]) -> None:
    model, ids = make_model(), make_ids(1, 8)
    packed = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(
        ValueError, match="expected non-decreasing values from 0 to seq, which is 8"
    ):
        backward_in_segments(model, ids, ids, segment_tokens=4, cu_seqlens=packed)


def test_rows_without_tokens_are_refused() -> None:
    ids = make_ids(1, 8)
    for wrong, what in ((ids[:, :0], "at least one token"), (ids[0], r"expected \[batch, seq\]")):
        with pytest.raises(ValueError, match=what):
            backward_in_segments(make_model(), wrong, wrong, segment_tokens=4)


def test_wrong_arguments_are_refused() -> None:
    model, ids = make_model(), make_ids(1, 8)
    with pytest.raises(ValueError, match="segment_tokens is 0; expected at least 1"):
        backward_in_segments(model, ids, ids, segment_tokens=0)
    with pytest.raises(ValueError, match=r"labels has shape \[1, 7\]; expected input_ids'"):
        backward_in_segments(model, ids, ids[:, :7], segment_tokens=4)
    with pytest.raises(NotImplementedError, match="has no state"):
        backward_in_segments(make_model(tnl_config(causal=False)), ids, ids, segment_tokens=4)
