"""Cross-entropy of a linear head: the numbers of the full logits, which never exist at once."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT, assert_close
from torch import Tensor

from transnormer.ops import linear_cross_entropy

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


def test_compiles_whole() -> None:
    x, weight, labels = make(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight, labels), linear_cross_entropy(x, weight, labels))


def test_the_library_op_passes_opcheck() -> None:
    op = torch.ops.transnormer.linear_cross_entropy.default
    torch.library.opcheck(op, make(torch.float32))
