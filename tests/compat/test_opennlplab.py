"""The signature of OpenNLPLab's package computes the recurrence, with all gradients."""

import oracles
import pytest
import torch
from tolerances import GRADIENT, LOG_DECAY_GRADIENT, assert_close
from torch import Tensor

from transnormer.compat.opennlplab import lightning_attn_func
from transnormer.ops.decay import tnl_log_decay

BATCH, HEADS, SEQ, KEY_DIM, VALUE_DIM = 2, 3, 100, 16, 20


def make_inputs(dtype: torch.dtype = torch.float32, heads: int = HEADS) -> list[Tensor]:
    """q, k, v in [batch, heads, seq, dim]."""
    q = torch.randn(BATCH, heads, SEQ, KEY_DIM) * KEY_DIM**-0.5
    k = torch.randn(BATCH, HEADS, SEQ, KEY_DIM)
    v = torch.randn(BATCH, HEADS, SEQ, VALUE_DIM)
    return [x.to(dtype) for x in (q, k, v)]


def exact(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    log_decay = None if s is None else -s.flatten()
    return oracles.linear_attention(*swapped, log_decay)[0].transpose(1, 2)


@pytest.mark.parametrize("shape", [(HEADS,), (HEADS, 1, 1), (1, HEADS, 1, 1)], ids=str)
def test_slopes_of_any_shape_decay_their_heads(shape: tuple[int, ...]) -> None:
    q, k, v = make_inputs()
    s = -tnl_log_decay(HEADS, 0, 24).view(shape)
    assert_close(lightning_attn_func(q, k, v, s), exact(q, k, v, s), name="o")


@pytest.mark.parametrize("variant", ["chunk_loop", "parallel"])
def test_variants_agree_with_the_recurrence_at_ragged_lengths(variant: str) -> None:
    q, k, v = make_inputs()
    s = torch.tensor([0.0, 7.75, float("inf")])
    assert_close(lightning_attn_func(q, k, v, s, variant), exact(q, k, v, s), name="o")


def test_no_slopes_mean_no_decay() -> None:
    q, k, v = make_inputs(heads=2 * HEADS)
    assert_close(lightning_attn_func(q, k, v), exact(q, k, v, None), name="o")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_inputs_is_that_of_the_output(dtype: torch.dtype) -> None:
    q, k, v = make_inputs(dtype)
    s = torch.full((HEADS, 1, 1), 0.1)
    o = lightning_attn_func(q, k, v, s)
    assert o.dtype == dtype
    assert_close(o, exact(q, k, v, s), name="o")


def test_gradients_reach_inputs_and_slopes() -> None:
    inputs = [*make_inputs(), torch.tensor([0.01, 0.3, 2.0]).view(HEADS, 1, 1)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    doubles = [x.double().requires_grad_() for x in inputs]
    o, exact_o = lightning_attn_func(*leaves), exact(*doubles)
    do = torch.randn_like(o)
    actual = torch.autograd.grad(o, leaves, do)
    wanted = torch.autograd.grad(exact_o, doubles, do.double())
    limit = GRADIENT[torch.float32]
    for name, x, y in zip("qkv", actual[:3], wanted[:3], strict=True):
        assert_close(x, y, limit=limit, name=f"gradient of {name}")
    assert actual[3].shape == inputs[3].shape
    limit = LOG_DECAY_GRADIENT[torch.float32]
    assert_close(actual[3], wanted[3], limit=limit, name="gradient of s")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "chunk"}, ValueError, "variant is 'chunk'; expected 'chunk_loop' or"),
        ({"s": torch.zeros(2)}, ValueError, r"s has shape \[2\]; expected one slope a head, 3"),
        ({"s": torch.full((3,), -0.5)}, ValueError, "s holds -0.5; expected slopes >= 0"),
        ({"s": torch.full((3,), float("nan"))}, ValueError, "s holds nan"),
        ({"s": torch.ones(3, dtype=torch.int32)}, TypeError, "s is torch.int32"),
        ({"s": torch.ones(3, device="meta")}, ValueError, "^s is on meta; expected cpu"),
        ({"s": 0.5}, TypeError, "s is float; expected a tensor or None"),
        ({"q": torch.randn(2, 3, 5)}, ValueError, r"expected \[batch, heads, seq, key_dim\]"),
        (
            {"k": torch.randn(2, 3, 99, 16)},
            ValueError,
            r"k has .*\[2, 3, 100, 16\] \(batch 2, kv_h",
        ),
        (
            {"v": torch.randn(2, 3, 99, 16)},
            ValueError,
            r"v has .*\[2, 3, 100, 16\] \(batch 2, kv_h",
        ),
    ],
)
def test_mistakes_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = dict(zip("qkv", make_inputs())) | {"s": torch.ones(HEADS)} | change
    with pytest.raises(error, match=message):
        lightning_attn_func(**arguments)


def test_the_output_is_ready_for_merged_heads() -> None:
    q, k, v = make_inputs()
    o = lightning_attn_func(q, k, v, torch.ones(HEADS))
    assert o.transpose(1, 2).is_contiguous()
