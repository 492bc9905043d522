"""Inputs for the tests of linear attention, and one way to compare a call with the oracle."""

from typing import NamedTuple

import oracles
import torch
from tolerances import GRADIENT, LOG_DECAY_GRADIENT, OUTPUT, STATE, assert_close
from torch import Tensor

from transnormer.ops import linear_attention

DECAYS = ("none", "constant", "token", "key")
# One token, below, at and above the sizes of chunks, and lengths that divide by nothing.
LENGTHS = (1, 15, 63, 64, 65, 100, 257, 1000)
# Very fast, very slow, ordinary, no history at all, no decay at all.
MIXED_DECAYS = (-30.0, -1e-6, -0.3, float("-inf"), 0.0)


class Inputs(NamedTuple):
    """Arguments of one call; initial_state is None unless asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None

    def leaves(self) -> "Inputs":
        """Detached copies that require gradients."""
        return Inputs(*(None if x is None else x.detach().clone().requires_grad_() for x in self))

    def double(self) -> "Inputs":
        """The same values in float64, detached."""
        return Inputs(*(None if x is None else x.detach().double() for x in self))


def make_log_decay(kind: str, batch: int, seq: int, kv_heads: int, key_dim: int) -> Tensor | None:
    """Log decays that mix the extremes with ordinary values, float32."""
    mixed = torch.tensor(MIXED_DECAYS)
    if kind == "none":
        return None
    if kind == "constant":
        # The ordinary value first, so that a single head gets it.
        return mixed.roll(3)[torch.arange(kv_heads) % len(mixed)]
    shape = (batch, seq, kv_heads) if kind == "token" else (batch, seq, kv_heads, key_dim)
    ordinary = -torch.rand(shape).square()
    extreme = mixed[torch.randint(len(mixed), shape)]
    return torch.where(torch.rand(shape) < 0.1, extreme, ordinary)


def make_inputs(
    seq: int,
    *,
    decay: str = "constant",
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    key_dim: int = 16,
    value_dim: int = 20,
    state_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs with key_dim != value_dim; state_rows adds an initial state of so many rows."""
    kv_heads = kv_heads or heads
    q = torch.randn(batch, seq, heads, key_dim) * key_dim**-0.5
    k = torch.randn(batch, seq, kv_heads, key_dim)
    v = torch.randn(batch, seq, kv_heads, value_dim)
    log_decay = make_log_decay(decay, batch, seq, kv_heads, key_dim)
    state = None
    if state_rows is not None:
        state = torch.randn(state_rows, kv_heads, key_dim, value_dim)
    if dtype == torch.float64:
        log_decay = None if log_decay is None else log_decay.double()
        state = None if state is None else state.double()
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state)


def check_forward(
    inputs: Inputs,
    implementation: str = "auto",
    *,
    state_limit: float | None = None,
    **kwargs: object,
) -> None:
    """Compare outputs and final state with the oracle's, at the dtype's limits."""
    q, k, v, log_decay, state = inputs
    o, final_state = linear_attention(
        q, k, v, log_decay, initial_state=state, implementation=implementation, **kwargs
    )
    exact_o, exact_state = oracles.linear_attention(
        q, k, v, log_decay, initial_state=state, **kwargs
    )
    assert o.dtype == q.dtype
    assert final_state.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_close(o, exact_o, limit=OUTPUT[q.dtype], name="o")
    limit = STATE[q.dtype] if state_limit is None else state_limit
    assert_close(final_state, exact_state, limit=limit, name="final_state")


def check_gradients(inputs: Inputs, implementation: str = "auto", **kwargs: object) -> None:
    """Compare the gradients of all inputs, through o and through final_state, with the oracle's."""
    exact_inputs, actual_inputs = inputs.double().leaves(), inputs.leaves()
    constant = inputs.log_decay is not None and inputs.log_decay.dim() == 1
    if constant:
        # One value a token: the gradient of the constant is a sum of these, which may cancel.
        expanded = exact_inputs.log_decay.detach().expand(inputs.k.shape[:3]).clone()
        exact_inputs = exact_inputs._replace(log_decay=expanded.requires_grad_())
    results = oracles.linear_attention(
        *exact_inputs[:4], initial_state=exact_inputs.initial_state, **kwargs
    )
    weights = [torch.randn_like(x) for x in results]
    sum((x * w).sum() for x, w in zip(results, weights)).backward()
    results = linear_attention(
        *actual_inputs[:4],
        initial_state=actual_inputs.initial_state,
        implementation=implementation,
        **kwargs,
    )
    sum((x.double() * w).sum() for x, w in zip(results, weights)).backward()
    for name, actual, exact in zip(Inputs._fields, actual_inputs, exact_inputs):
        if actual is None:
            continue
        assert actual.grad is not None, f"{name} has no gradient"
        assert actual.grad.dtype == actual.dtype
        limit, grad, scale = GRADIENT[inputs.q.dtype], exact.grad, None
        if constant and name == "log_decay":
            limit, scale = LOG_DECAY_GRADIENT[inputs.q.dtype], grad.square().sum((0, 1)).sqrt()
            grad = grad.sum((0, 1))
        assert_close(actual.grad, grad, limit=limit, scale=scale, name=f"gradient of {name}")
    if actual_inputs.log_decay is not None:
        blocked = actual_inputs.log_decay.isneginf()
        assert bool((actual_inputs.log_decay.grad[blocked] == 0).all())
