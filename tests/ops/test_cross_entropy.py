"""Cross-entropy of a linear head: the numbers of the full logits, which never exist at once."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT, assert_close
from torch import Tensor

from transnormer.ops import linear_cross_entropy
from transnormer.ops.cross_entropy.triton_softmax import losses_in_place

ROWS, DIM, VOCAB = 45, 12, 70


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(ROWS, DIM).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (ROWS,))
    labels[::7] = -100
    return x, weight, labels


def exact(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients of their weighted sum in float64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(x @ weight.T, labels, ignore_index=-100, reduction="none")
    (losses * torch.arange(ROWS)).sum().backward()
    return losses, x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_match(dtype: torch.dtype) -> None:
    x, weight, labels = make(dtype)
    losses = linear_cross_entropy(x, weight, labels)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (losses * torch.arange(ROWS)).sum().backward()
    for name, actual, wanted in zip(
        ("loss", "x", "weight"), (losses, x.grad, weight.grad), exact(x, weight, labels)
    ):
        assert_close(actual, wanted, limit=GRADIENT[dtype], name=name)


def test_ignored_rows_are_free() -> None:
    x, weight, labels = make(torch.float32)
    losses = linear_cross_entropy(x, weight, labels)
    losses.sum().backward()
    assert bool((losses[::7] == 0).all())
    assert bool((x.grad[::7] == 0).all())
    assert bool((losses[1::7] > 0).all())


def test_every_row_ignored_gives_zero() -> None:
    x, weight, labels = make(torch.float32)
    losses = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    losses.sum().backward()
    assert bool((losses == 0).all())
    assert bool((weight.grad == 0).all())


def test_large_logits_do_not_overflow() -> None:
    x, weight, labels = make(torch.float32)
    x = (x * 1e4).detach().requires_grad_()
    losses = linear_cross_entropy(x, weight, labels)
    assert_close(losses, exact(x, weight, labels)[0])


@pytest.mark.parametrize("label", [-1, 70, -99])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    x, weight, labels = make(torch.float32)
    labels[3] = label
    with pytest.raises(ValueError, match=str(label)):
        linear_cross_entropy(x, weight, labels)


def test_wrong_arguments_are_refused() -> None:
    x, weight, labels = make(torch.float32)
    with pytest.raises(TypeError, match="labels"):
        linear_cross_entropy(x, weight, labels.int())
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(x, weight[:, :-1], labels)
    with pytest.raises(ValueError, match="x"):
        linear_cross_entropy(x[None], weight, labels)
    with pytest.raises(ValueError, match=r"weight has shape \[\]"):
        linear_cross_entropy(x, torch.tensor(1.0), labels)
    with pytest.raises(TypeError, match="weight is torch.float16"):
        linear_cross_entropy(x, weight.half(), labels)
    with pytest.raises(TypeError, match="x is torch.int64"):
        linear_cross_entropy(x.long(), weight.long(), labels)
    with pytest.raises(TypeError, match="labels is list"):
        linear_cross_entropy(x, weight, labels.tolist())


def test_compiles_whole() -> None:
    x, weight, labels = make(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight, labels), linear_cross_entropy(x, weight, labels))


def test_the_library_op_passes_opcheck() -> None:
    op = torch.ops.transnormer.linear_cross_entropy.default
    torch.library.opcheck(op, make(torch.float32))


def weighted_sum(x: Tensor, weight: Tensor, labels: Tensor, implementation: str) -> Tensor:
    total = linear_cross_entropy(x, weight, labels, reduction="sum", implementation=implementation)
    (0.37 * total).backward()
    return total


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("vocab_size", [70, 4_100], ids=str)
def test_the_sum_and_its_gradients_match(implementation: str, vocab_size: int) -> None:
    x = torch.randn(ROWS, DIM).requires_grad_()
    # Logits far from 0 in the last rows, whose sum without a common factor would overflow.
    scales = torch.where(torch.arange(ROWS) < 40, 1.0, 8.0)[:, None]
    weight = torch.randn(vocab_size, DIM).requires_grad_()
    labels = torch.randint(vocab_size, (ROWS,))
    labels[::7] = -100
    total = weighted_sum(x * scales, weight, labels, implementation)
    exact_x, exact_weight = (y.detach().double().requires_grad_() for y in (x, weight))
    logits = (exact_x * scales) @ exact_weight.T
    exact_total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (0.37 * exact_total).backward()
    for name, actual, wanted in (
        ("loss", total, exact_total),
        ("x", x.grad, exact_x.grad),
        ("weight", weight.grad, exact_weight.grad),
    ):
        assert_close(actual, wanted, limit=GRADIENT[torch.float32], name=name)


def test_the_kernel_takes_half_precision_in_strides() -> None:
    x = torch.randn(DIM, ROWS).half().T.requires_grad_()
    weight = torch.randn(DIM, VOCAB).half().T.requires_grad_()
    labels = torch.randint(VOCAB, (2 * ROWS,))[::2]
    total = weighted_sum(x, weight, labels, "triton")
    wide = [y.detach().double().requires_grad_() for y in (x, weight)]
    exact_total = weighted_sum(wide[0], wide[1], labels, "tiled")
    for name, actual, wanted in (
        ("loss", total, exact_total),
        ("x", x.grad, wide[0].grad),
        ("weight", weight.grad, wide[1].grad),
    ):
        assert_close(actual, wanted, limit=GRADIENT[torch.float16], name=name)


def test_a_second_derivative_of_the_sum_is_refused_not_zero() -> None:
    x, weight, labels = make(torch.float32)
    total = linear_cross_entropy(x, weight, labels, reduction="sum", implementation="triton")
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), x)


def test_the_kernel_forms_no_gradient_that_nobody_wants() -> None:
    x, weight, labels = make(torch.float32)
    with torch.no_grad():
        total = linear_cross_entropy(x, weight, labels, reduction="sum", implementation="triton")
    assert not total.requires_grad
    assert_close(total, linear_cross_entropy(x, weight, labels).sum())


def test_one_gradient_alone_is_the_same() -> None:
    x, weight, labels = make(torch.float32)
    both = weighted_sum(x, weight, labels, "triton")
    frozen = weight.detach()
    alone = x.detach().requires_grad_()
    assert torch.equal(weighted_sum(alone, frozen, labels, "triton"), both)
    assert torch.equal(alone.grad, x.grad)


def test_a_row_that_is_ignored_may_hold_any_logits() -> None:
    x, weight, labels = make(torch.float32)
    with torch.no_grad():
        x[0] = float("inf")
    total = weighted_sum(x, weight, labels, "triton")
    assert bool(total.isfinite())
    assert bool((x.grad[7] == 0).all())


@pytest.mark.parametrize("label", [VOCAB, -1])
def test_a_label_that_only_the_kernel_sees_gives_nan(label: int) -> None:
    x, weight, labels = make(torch.float32)
    labels[3] = label
    total, *_ = torch.ops.transnormer.linear_cross_entropy_sum(x, weight, labels, False)
    assert bool(total.isnan())


def test_implementations_that_cannot_run_say_why() -> None:
    x, weight, labels = make(torch.float32)
    with pytest.raises(NotImplementedError, match="reduction is 'none'"):
        linear_cross_entropy(x, weight, labels, implementation="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        linear_cross_entropy(
            x.double(), weight.double(), labels, reduction="sum", implementation="triton"
        )
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        linear_cross_entropy(x, weight, labels, reduction="mean")
    with pytest.raises(ValueError, match="implementation of linear_cross_entropy is 'fast'"):
        linear_cross_entropy(x, weight, labels, implementation="fast")


def test_the_sum_compiles_whole_and_passes_opcheck() -> None:
    x, weight, labels = make(torch.float32)

    def total(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, reduction="sum", implementation="triton")

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found, exact = compiled(x, weight, labels), total(x, weight, labels)
    assert_close(found, exact)
    pairs = (torch.autograd.grad(y, (x, weight)) for y in (found, exact))
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)
    op = torch.ops.transnormer.linear_cross_entropy_sum.default
    # The test of the traced backward pass differentiates the gradients too, which is refused.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*make(torch.float32), True), test_utils=checks)
    torch.library.opcheck(op, (x.detach(), weight.detach(), labels, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [96, 70], ids=["in registers", "in two reads"])
def test_logits_of_16_bits_become_their_gradient(dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.cat([torch.randn(9, vocab_size), 30 * torch.randn(4, vocab_size)]).to(dtype)
    logits[6] = float("inf")
    labels = torch.randint(vocab_size, (13,))
    labels[5:7], labels[7] = -100, vocab_size
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels.where(labels < vocab_size, 0), reduction="none")
    expected[labels >= 0].sum().backward()
    losses = torch.empty(13)
    # The kernel reads no further than the row; what lies behind it stays.
    buffer = torch.full((13, vocab_size + 3), 7.0, dtype=dtype)
    found = buffer[:, :vocab_size].copy_(logits)
    losses_in_place(found, labels, losses, ignored=-100, with_gradient=True)
    seen = (labels >= 0) & (labels < vocab_size)
    assert_close(losses[seen], expected[seen])
    assert_close(found[seen], exact.grad[seen], limit=GRADIENT[dtype])
    assert bool((buffer[:, vocab_size:] == 7).all())
    assert bool((losses[5:7] == 0).all())
    assert bool((found[5:7] == 0).all())
    assert bool(losses[7].isnan())
    alone = torch.empty(13)
    losses_in_place(logits, labels, alone, ignored=-100, with_gradient=False)
    assert torch.equal(alone.nan_to_num(), losses.nan_to_num())


def test_no_rows_give_no_gradient() -> None:
    x, weight, _ = make(torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    total = weighted_sum(x[:0], weight, empty, "triton")
    assert total == 0
    assert bool((weight.grad == 0).all())
