"""Launches that are prepared once give what launches through Triton's JIT give, bit for bit."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from attention_cases import Inputs
from kernel_cases import assert_same, laid_out, results
from torch import Tensor

from transnormer.ops import linear_attention

pytestmark = pytest.mark.gpu
GPU = "cuda"


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    from transnormer.ops.linear_attention import triton_form

    triton_form._remembered.cache_clear()
    yield
    triton_form._remembered.cache_clear()


def through_the_jit(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], list[Tensor]]
) -> list[Tensor]:
    from transnormer.ops.linear_attention import triton_form

    with monkeypatch.context() as patch:
        patch.setattr(triton_form, "_remembered", triton_form.Form)
        return work()


def make(
    *,
    seq: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    rows: int,
    decay: str,
    with_state: bool,
) -> Inputs:
    shapes = (heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1])
    q, k, v = (torch.randn(1, seq, *shape, device=GPU, dtype=torch.bfloat16) for shape in shapes)
    log_decay = {
        "none": None,
        "constant": -torch.logspace(-4, 0, kv_heads, device=GPU),
        "gates": -torch.rand(1, seq, kv_heads, device=GPU),
    }[decay]
    state = torch.randn(rows, kv_heads, *dims, device=GPU) if with_state else None
    return Inputs(q, k, v, log_decay, state)


CASES = {
    "plain": {},
    "no decay": {"decay": "none"},
    "gates": {"decay": "gates"},
    "segments": {"seq": 16_384, "heads": 2, "kv_heads": 2},
    "segments of gates": {"seq": 16_384, "heads": 2, "kv_heads": 2, "decay": "gates"},
    "groups": {"heads": 8, "kv_heads": 2},
    "other values": {"dims": (64, 128)},
    "other values of gates": {"dims": (64, 128), "decay": "gates"},
    "packed": {"rows": 3},
    "packed gates": {"rows": 3, "decay": "gates"},
}


@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_later_calls_are_those_of_the_jit(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], reverse: bool, with_state: bool
) -> None:
    sizes = {
        "seq": 700, "heads": 4, "kv_heads": 4, "dims": (64, 64), "rows": 1, "decay": "constant"
    } | case  # fmt: skip
    seq = sizes["seq"]
    bounds = torch.tensor([0, 5, 5, seq], device=GPU) if sizes["rows"] > 1 else None

    def work(given: Inputs) -> list[Tensor]:
        return results(given, cu_seqlens=bounds, reverse=reverse, scale=0.5)

    # The first two are of one form, the others each of another; each twice, so that it is remembered.
    inputs = [make(**sizes, with_state=with_state) for _ in range(2)]
    for how in ("heads_first", "surrounded", "unaligned", "every_second"):
        made = make(**sizes, with_state=with_state)
        inputs.append(Inputs(*(laid_out(x, how) for x in made[:3]), *made[3:]))
    for given in (*inputs, *inputs):
        expected = through_the_jit(monkeypatch, lambda given=given: work(given))
        assert_same(work(given), expected)


@pytest.mark.parametrize("seq", [700, 16_384], ids=["one", "segments"])
@pytest.mark.parametrize("decay", ["constant", "gates"])
def test_variants_of_one_form_are_those_of_the_jit(
    monkeypatch: pytest.MonkeyPatch, decay: str, seq: int
) -> None:
    inputs = make(
        seq=seq, heads=2, kv_heads=2, dims=(64, 64), rows=1, decay=decay, with_state=True
    )  # fmt: skip
    do = torch.randn_like(inputs.v)

    def work(with_state: bool, with_decay: bool, given: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        leaves[3].requires_grad_(with_decay)
        outputs = linear_attention(*leaves[:4], initial_state=leaves[4] if with_state else None)
        grads = {
            "both": [do, torch.ones_like(outputs[1])],
            "state": [None, torch.ones_like(outputs[1])],
            "turned": [do.transpose(1, 2).contiguous().transpose(1, 2), None],
            "one": [do[:, :1].expand_as(do), None],
        }[given]
        given_to = [pair for pair in zip(outputs, grads) if pair[1] is not None]
        torch.autograd.backward(*map(list, zip(*given_to)))
        return [*(x.detach() for x in outputs), *(x.grad for x in leaves if x.grad is not None)]

    for how in 2 * list(product((False, True), (False, True), ("both", "state", "turned", "one"))):
        assert_same(work(*how), through_the_jit(monkeypatch, lambda how=how: work(*how)))


def test_a_stream_of_its_own_is_the_one_that_launches() -> None:
    q, k, v = (torch.randn(1, 300, 2, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    log_decay = -torch.logspace(-4, 0, 2, device=GPU)
    exact = linear_attention(q, k, v, log_decay)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        given = (q + 0, k + 0, v + 0)
        o = linear_attention(*given, log_decay)[0]
    stream.synchronize()
    assert torch.equal(o, exact)
