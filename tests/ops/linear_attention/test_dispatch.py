"""A named implementation runs or says why not; "auto" takes the first that can."""

import pytest
import torch
import triton
from attention_cases import make_inputs

from transnormer.ops import dispatch, linear_attention


@pytest.mark.parametrize("decay", ["token", "key"])
def test_lightning1_refuses_gated_decay_with_the_reason(decay: str) -> None:
    inputs = make_inputs(10, decay=decay)
    with pytest.raises(NotImplementedError, match="constant decay"):
        linear_attention(*inputs[:4], implementation="lightning1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may run here")
def test_triton_refuses_the_cpu_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(10)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"triton.*(cpu|GPU|CUDA)"):
        linear_attention(*inputs[:4], implementation="triton")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto'.*'chunked'.*'reference'"):
        linear_attention(*make_inputs(10)[:4], implementation="fused")


def refuse(_: object) -> Exception:
    return RuntimeError("there is no device for it")


def row(name: str, supports: object, automatic: bool = True) -> dispatch.Implementation:
    return dispatch.Implementation(name, supports, lambda: name, automatic)


def test_auto_takes_the_first_row_that_can_run() -> None:
    rows = [row("a", refuse), row("b", lambda _: None, False), row("c", lambda _: None)]
    assert dispatch.choose("op", rows, None, "auto").name == "c"
    assert dispatch.choose("op", rows, None, "b").name == "b"
    with pytest.raises(RuntimeError, match="no device"):
        dispatch.choose("op", rows, None, "a")


def test_auto_without_any_row_says_every_reason() -> None:
    with pytest.raises(RuntimeError, match="no device"):
        dispatch.choose("op", [row("a", refuse)], None, "auto")
