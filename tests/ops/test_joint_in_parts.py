"""The joint op on parts of rows: what passes between them makes it the op on whole rows."""

from typing import Any

import pytest
import torch
from kernel_cases import force_segments, needs_interpreter
from tolerances import JOINT_ATTENTION, assert_close
from torch import Tensor

from transnormer.ops.joint_attention import joint_attention
from transnormer.ops.joint_attention.in_parts import joint_attention_in_parts, runs_in_parts

DIM, HEADS, BATCH = 16, 2, 2
# One whose past is forgotten within a few tokens, and one of a usual layer.
DECAYS = (-2.0, -0.1)


class Passed:
    """The exchanges of parts that run one after the other: a state, and how often it passed."""

    def __init__(self, state: Tensor) -> None:
        self.state, self.calls = state, 0

    def between(self, decay: Tensor, tokens: int) -> Any:
        """The exchange of a part: what entered it, while it hands on what leaves."""

        def exchange(own: Tensor) -> Tensor:
            assert own.dtype == torch.float32
            entering = self.state
            self.state = (tokens * decay).exp()[:, None, None] * entering + own
            self.calls += 1
            return entering

        return exchange


def inputs(seq: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A projection, decays and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(BATCH, seq, 4 * HEADS * DIM, generator=generator).to(dtype)
    grad = torch.randn(BATCH, seq, HEADS * DIM, generator=generator).to(dtype)
    return joint, torch.tensor(DECAYS), grad


def whole(joint: Tensor, decay: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The op on whole rows in float64, and the gradient of the projection."""
    leaf = joint.double().requires_grad_()
    decay = None if decay is None else decay.double()
    y = joint_attention(leaf, decay, head_dim=DIM, eps=1e-6)
    y.backward(grad.double())
    return y.detach(), leaf.grad


def in_parts(
    joint: Tensor, decay: Tensor | None, grad: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The same by parts, each with the exchanges that ranks have."""
    zero = torch.zeros(BATCH, HEADS, DIM, DIM)
    ahead, back = Passed(zero), Passed(zero)
    factors = torch.zeros(HEADS) if decay is None else decay
    leaf = joint.detach().requires_grad_()
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = [
        joint_attention_in_parts(
            leaf[:, a:b], decay, head_dim=DIM, eps=1e-6, ahead=ahead.between(factors, b - a),
            back=back.between(factors, b - a), implementation="triton",
        )
        for a, b in zip(ends, ends[1:])
    ]  # fmt: skip
    # From the last part to the first, as their gradients need each other.
    for y, a, b in reversed(list(zip(parts, ends, ends[1:]))):
        y.backward(grad[:, a:b], retain_graph=True)
    assert ahead.calls == back.calls == len(lengths)
    return torch.cat(parts, 1).detach(), leaf.grad


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [((7,), torch.float32), ((9, 1, 4), torch.float32), ((9, 4), torch.bfloat16)],
    ids=["one", "three", "bfloat16"],
)
def test_parts_are_the_whole(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    joint, decay, grad = inputs(sum(lengths), dtype)
    exact = whole(joint, decay, grad)
    for actual, expected in zip(in_parts(joint, decay, grad, lengths), exact):
        assert actual.dtype == dtype
        assert_close(actual, expected, limit=JOINT_ATTENTION[dtype])


@needs_interpreter
@pytest.mark.parametrize("with_decay", [True, False], ids=["decay", "none"])
def test_parts_of_several_segments_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, with_decay: bool
) -> None:
    force_segments(monkeypatch, 16)
    joint, decay, grad = inputs(54, torch.float32)
    given = decay if with_decay else None
    # The last segments of a part: full, one token, and the only one.
    for actual, expected in zip(
        in_parts(joint, given, grad, (32, 17, 5)), whole(joint, given, grad)
    ):
        assert_close(actual, expected, limit=JOINT_ATTENTION[torch.float32])


@needs_interpreter
def test_the_entering_states_are_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transnormer.ops.linear_attention.triton_launch import Call

    made = []
    original = Call.states
    monkeypatch.setattr(Call, "states", lambda *given: made.append(given) or original(*given))
    in_parts(*inputs(8, torch.float32), (5, 3))
    assert len(made) == 2


@needs_interpreter
def test_a_second_derivative_is_refused() -> None:
    joint, decay, _ = inputs(4, torch.float32)
    leaf, factor = joint.requires_grad_(), torch.ones((), requires_grad=True)
    y = joint_attention_in_parts(
        leaf, decay, head_dim=DIM, eps=1e-6, ahead=torch.zeros_like, back=torch.zeros_like,
        implementation="triton",
    )  # fmt: skip
    (first,) = torch.autograd.grad((factor * y).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_kernels_cannot_run_is_said_before_and_refused() -> None:
    joint, decay, _ = inputs(4, torch.float32)
    assert not runs_in_parts(joint, decay, head_dim=DIM)
    with pytest.raises(RuntimeError, match="'triton': inputs are on cpu; move them to a GPU"):
        joint_attention_in_parts(
            joint, decay, head_dim=DIM, eps=1e-6, ahead=torch.zeros_like, back=torch.zeros_like
        )
    with pytest.raises(ValueError, match="is 'torch'; expected 'auto', 'triton'"):
        joint_attention_in_parts(
            joint, decay, head_dim=DIM, eps=1e-6, ahead=torch.zeros_like, back=torch.zeros_like,
            implementation="torch",
        )  # fmt: skip
    # Shapes and dtypes alone are asked.
    there = joint.to("meta")
    assert runs_in_parts(there, None, head_dim=DIM)
    assert not runs_in_parts(there.double(), None, head_dim=DIM)
    assert not runs_in_parts(there, decay.requires_grad_(), head_dim=DIM)
    assert not runs_in_parts(there.repeat(1, 1, 10), None, head_dim=10 * DIM * HEADS)
