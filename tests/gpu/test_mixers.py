"""Every token mixer on a GPU: its decoder against float64 on the CPU, splits, packing, training."""

import pytest
import torch
from decoder_cases import assert_logits_agree
from nn.mixer_cases import CASES, MixerCase, ids_of
from tolerances import SPLIT_GPU
from torch import Tensor

from transnormer.models.decoder import Decoder

pytestmark = pytest.mark.gpu
GPU = "cuda"
SEQ = 200
# Half-precision training: relative difference of the loss from float64's.
LOSS_BF16 = 0.02


def on_gpu(case: MixerCase, dtype: torch.dtype = torch.float32) -> Decoder:
    return case.model(dtype).to(GPU)


def exact_logits(case: MixerCase, ids: Tensor) -> Tensor:
    """Logits of the same weights in float64 on the CPU."""
    return case.model().double()(ids).logits


@pytest.fixture(autouse=True)
def _ieee_products() -> None:
    """float32 products without TF32: what is compared is the mixer's form."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_float64(case: MixerCase) -> None:
    ids = ids_of(2, SEQ)
    with torch.no_grad():
        actual = on_gpu(case)(ids.to(GPU)).logits.cpu()
        assert_logits_agree(actual, exact_logits(case, ids), SPLIT_GPU)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prefill_and_steps_equal_the_whole(case: MixerCase) -> None:
    ids, model = ids_of(3, SEQ).to(GPU), on_gpu(case)
    with torch.no_grad():
        whole = model(ids).logits
        parts, state, start = [], None, 0
        for length in (70, 1, 64, 3, *[1] * (SEQ - 138)):
            out = model(ids[:, start : start + length], state=state)
            parts.append(out.logits)
            state, start = out.state, start + length
    assert_logits_agree(torch.cat(parts, 1).cpu(), whole.cpu(), SPLIT_GPU)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed_equals_separate(case: MixerCase) -> None:
    ids, model = ids_of(1, SEQ).to(GPU), on_gpu(case)
    bounds = [0, 1, 1, 90, SEQ]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=GPU)).logits
        separate = [model(ids[:, a:b]).logits for a, b in zip(bounds, bounds[1:]) if b > a]
    assert_logits_agree(packed.cpu(), torch.cat(separate, 1).cpu(), SPLIT_GPU)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_under_bfloat16_autocast(case: MixerCase) -> None:
    ids, labels = ids_of(2, SEQ), ids_of(2, SEQ, seed=5)
    model, exact = on_gpu(case), case.model().double()
    with torch.autocast(GPU, torch.bfloat16):
        loss = model.loss(ids.to(GPU), labels.to(GPU))
    loss.backward()
    exact_loss = exact.loss(ids, labels)
    exact_loss.backward()
    assert abs(loss.item() / exact_loss.item() - 1) < LOSS_BF16
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    products = [
        (a.grad.cpu().double().flatten(), b.grad.flatten())
        for a, b in zip(model.parameters(), exact.parameters(), strict=True)
    ]
    ours, theirs = (torch.cat(x) for x in zip(*products))
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
    assert cosine > 0.98


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bidirectional_equals_float64(case: MixerCase) -> None:
    if case.bidirectional is None:
        pytest.skip("refuses causal=False")
    ids = ids_of(2, SEQ)
    with torch.no_grad():
        actual = case.model(causal=False).to(GPU)(ids.to(GPU)).logits.cpu()
        exact = case.model(causal=False).double()(ids).logits
    assert_logits_agree(actual, exact, SPLIT_GPU)
