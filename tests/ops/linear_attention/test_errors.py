"""Every wrong argument is refused at the door, with the kind of error the contract names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transnormer.ops import linear_attention, linear_attention_step

NAN, INF = float("nan"), float("inf")


def arguments(**changes: object) -> dict[str, object]:
    """A valid call with some arguments replaced."""
    valid = {
        "q": torch.randn(2, 10, 4, 16),
        "k": torch.randn(2, 10, 2, 16),
        "v": torch.randn(2, 10, 2, 20),
        "log_decay": torch.tensor([-0.1, -0.2]),
        "initial_state": torch.zeros(2, 2, 16, 20),
    }
    return valid | changes


def packed(**changes: object) -> dict[str, object]:
    """A valid packed call with some arguments replaced."""
    valid = {
        "q": torch.randn(1, 10, 2, 16),
        "k": torch.randn(1, 10, 2, 16),
        "v": torch.randn(1, 10, 2, 20),
        "log_decay": None,
        "initial_state": None,
        "cu_seqlens": torch.tensor([0, 4, 10]),
    }
    return valid | changes


GATED = torch.full((2, 10, 2), -0.1)
MIXED_UP = torch.randn(2, 10, 3, 16)
WRONG: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("q-rank", arguments(q=torch.randn(2, 10, 16)), ValueError, "q"),
    ("k-rank", arguments(k=torch.randn(2, 10, 16)), ValueError, "k"),
    ("v-rank", arguments(v=torch.randn(2, 10, 20)), ValueError, "v"),
    ("k-seq", arguments(k=torch.randn(2, 9, 2, 16)), ValueError, "k"),
    ("k-batch", arguments(k=torch.randn(1, 10, 2, 16)), ValueError, "k"),
    ("k-dim", arguments(k=torch.randn(2, 10, 2, 12)), ValueError, "k"),
    ("v-heads", arguments(v=torch.randn(2, 10, 4, 20)), ValueError, "k"),
    ("v-seq", arguments(v=torch.randn(2, 11, 2, 20)), ValueError, "v"),
    ("kv-heads", arguments(k=MIXED_UP, v=torch.randn(2, 10, 3, 20)), ValueError, "heads"),
    ("k-dtype", arguments(k=torch.randn(2, 10, 2, 16).double()), TypeError, "k"),
    ("v-dtype", arguments(v=torch.randn(2, 10, 2, 20).half()), TypeError, "v"),
    ("integers", arguments(q=torch.ones(2, 10, 4, 16, dtype=torch.long)), TypeError, "q"),
    ("batch-0", arguments(q=torch.ones(0, 10, 4, 16)), ValueError, "batch"),
    ("heads-0", arguments(q=torch.ones(2, 10, 0, 16)), ValueError, "heads"),
    ("decay-heads", arguments(log_decay=torch.zeros(4)), ValueError, "log_decay"),
    ("decay-rank", arguments(log_decay=torch.zeros(10, 2)), ValueError, "log_decay"),
    ("decay-seq", arguments(log_decay=torch.zeros(2, 9, 2)), ValueError, "log_decay"),
    ("decay-key", arguments(log_decay=torch.zeros(2, 10, 2, 20)), ValueError, "log_decay"),
    ("decay-type", arguments(log_decay=torch.zeros(2, dtype=torch.int)), TypeError, "log_decay"),
    (
        "decay-nan",
        arguments(log_decay=torch.tensor([-1.0, NAN])),
        ValueError,
        "log_decay holds NaN",
    ),
    (
        "decay-positive",
        arguments(log_decay=torch.tensor([-1.0, 0.5])),
        ValueError,
        "log_decay holds 0.5",
    ),
    (
        "decay-infinite",
        arguments(log_decay=torch.tensor([-1.0, INF])),
        ValueError,
        "log_decay holds inf",
    ),
    (
        "gate-nan",
        arguments(log_decay=GATED.masked_fill(GATED < 0, NAN)),
        ValueError,
        "log_decay holds NaN",
    ),
    ("gate-positive", arguments(log_decay=-GATED), ValueError, "log_decay"),
    (
        "state-shape",
        arguments(initial_state=torch.zeros(2, 4, 16, 20)),
        ValueError,
        "initial_state",
    ),
    (
        "state-turned",
        arguments(initial_state=torch.zeros(2, 2, 20, 16)),
        ValueError,
        "initial_state",
    ),
    (
        "state-half",
        arguments(initial_state=torch.zeros(2, 2, 16, 20).half()),
        TypeError,
        "initial_state",
    ),
    (
        "state-64",
        arguments(initial_state=torch.zeros(2, 2, 16, 20).double()),
        TypeError,
        "initial_state",
    ),
    ("pack-batch", arguments(cu_seqlens=torch.tensor([0, 10])), ValueError, "batch"),
    ("pack-type", packed(cu_seqlens=torch.tensor([0.0, 10.0])), TypeError, "cu_seqlens"),
    ("pack-rank", packed(cu_seqlens=torch.tensor([[0, 10]])), ValueError, "cu_seqlens"),
    ("pack-short", packed(cu_seqlens=torch.tensor([0])), ValueError, "cu_seqlens"),
    ("pack-start", packed(cu_seqlens=torch.tensor([1, 10])), ValueError, "cu_seqlens"),
    ("pack-end", packed(cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens"),
    ("pack-order", packed(cu_seqlens=torch.tensor([0, 6, 4, 10])), ValueError, "cu_seqlens"),
    ("pack-state", packed(initial_state=torch.zeros(1, 2, 16, 20)), ValueError, "initial_state"),
    ("device", arguments(k=torch.randn(2, 10, 2, 16, device="meta")), ValueError, "k"),
    (
        "unknown",
        arguments(implementation="fastest"),
        ValueError,
        "implementation of linear_attention is 'fastest",
    ),
]


@pytest.mark.parametrize(
    ("kwargs", "error", "named"),
    [pytest.param(*row[1:], id=row[0]) for row in WRONG],
)
def test_wrong_argument_is_refused(
    kwargs: dict[str, object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=rf"^{named}\b"):
        linear_attention(**kwargs)


@pytest.mark.parametrize("make", [arguments, packed])
def test_the_valid_calls_of_this_table_run(make: Callable[[], dict[str, object]]) -> None:
    linear_attention(**make())


def step_arguments(**changes: object) -> dict[str, object]:
    """A valid step with some arguments replaced."""
    valid = {
        "q": torch.randn(2, 4, 16),
        "k": torch.randn(2, 2, 16),
        "v": torch.randn(2, 2, 20),
        "log_decay": torch.tensor([-0.1, -0.2]),
        "state": torch.zeros(2, 2, 16, 20),
    }
    return valid | changes


def slots(*rows: int) -> Tensor:
    """Slot numbers as the contract wants them."""
    return torch.tensor(rows, dtype=torch.int32)


TOKENS = {"q": torch.randn(2, 9, 4, 16), "k": torch.randn(2, 9, 2, 16)}
WRONG_STEPS: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("q-rank", step_arguments(q=torch.randn(4, 16)), ValueError, "q"),
    ("k-shape", step_arguments(k=torch.randn(2, 2, 12)), ValueError, "k"),
    ("v-heads", step_arguments(v=torch.randn(2, 4, 20)), ValueError, "k"),
    ("kv-heads", step_arguments(q=torch.randn(2, 3, 16)), ValueError, "heads"),
    ("k-dtype", step_arguments(k=torch.randn(2, 2, 16).double()), TypeError, "k"),
    ("nine", step_arguments(**TOKENS, v=torch.randn(2, 9, 2, 20)), ValueError, "tokens"),
    ("decay-shape", step_arguments(log_decay=torch.zeros(3)), ValueError, "log_decay"),
    (
        "decay-nan",
        step_arguments(log_decay=torch.tensor([NAN, 0.0])),
        ValueError,
        "log_decay holds NaN",
    ),
    (
        "decay-positive",
        step_arguments(log_decay=torch.tensor([0.1, 0.0])),
        ValueError,
        r"log_decay holds 0\.1\d*",
    ),
    ("decay-type", step_arguments(log_decay=torch.tensor([0, 0])), TypeError, "log_decay"),
    ("state-shape", step_arguments(state=torch.zeros(2, 2, 20, 16)), ValueError, "state"),
    ("state-rows", step_arguments(state=torch.zeros(3, 2, 16, 20)), ValueError, "state"),
    ("state-half", step_arguments(state=torch.zeros(2, 2, 16, 20).half()), TypeError, "state"),
    ("slot-type", step_arguments(slots=torch.tensor([0, 1])), TypeError, "slots"),
    ("slot-shape", step_arguments(slots=slots(0)), ValueError, "slots"),
    ("slot-outside", step_arguments(slots=slots(0, 2)), ValueError, "slots"),
    ("slot-negative", step_arguments(slots=slots(0, -2)), ValueError, "slots"),
]


@pytest.mark.parametrize(
    ("kwargs", "error", "named"),
    [pytest.param(*row[1:], id=row[0]) for row in WRONG_STEPS],
)
def test_wrong_step_argument_is_refused(
    kwargs: dict[str, object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=rf"^{named}\b"):
        linear_attention_step(**kwargs)


def test_messages_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"heads is 4; expected a multiple of kv_heads"):
        linear_attention(**arguments(k=MIXED_UP, v=torch.randn(2, 10, 3, 20)))
