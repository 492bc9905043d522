"""The expand-oscillate-shrink mixer: every arm of the grid against its own equation."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from transnormer.nn.token_mixers import EosConfig
from transnormer.nn.token_mixers.eos import Eos, EosActivation, Oscillation
from transnormer.ops.decay import alibi_slopes

DIM, HEADS, KEY, SEQ = 12, 2, 5, 11
VALUE = DIM // HEADS
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "1+elu": lambda x: torch.where(x > 0, 1 + x, x.exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "square": lambda x: x**2,
}


def build(**changes: object) -> Eos:
    torch.manual_seed(1)
    mixer = EosConfig(**{"heads": HEADS, "key_dim": KEY, **changes}).build(DIM, 0, 1, causal=True)
    return mixer.double()


def run(mixer: Eos, x: Tensor, state: object = None) -> tuple[Tensor, object]:
    return mixer(x, positions=torch.arange(x.shape[1]).expand(x.shape[:2]), state=state)


def projected(mixer: Eos, name: str, x: Tensor, dim: int) -> Tensor:
    return (x @ getattr(mixer, name).weight.T).unflatten(-1, (-1, dim))


def gate(logit: Tensor, config: EosConfig) -> Tensor:
    return torch.sigmoid(logit) ** (1 / config.temperature)


def vector(mixer: Eos, name: str, source: str, x: Tensor) -> Tensor:
    """e or s as [batch, seq, heads, key, value or 1]."""
    if source == "constant":
        return getattr(mixer, f"{name}_matrix").expand(*x.shape[:2], -1, -1, -1)
    y = projected(mixer, f"{name}_proj", x, KEY)
    return ACTIVATIONS[mixer.config.activation](y)[..., None]


def oscillation(mixer: Eos, x: Tensor, e: Tensor) -> Tensor:
    """o as [batch or 1, seq or 1, heads, key or 1, value or 1]."""
    config, name = mixer.config, mixer.config.oscillation
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    if name == "ones":
        return one
    if name == "slopes":
        return (-torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)).exp()[:, None, None]
    if name == "phase":
        theta = 10_000.0 ** (-2.0 * torch.arange(KEY, dtype=torch.float64) / KEY)
        return torch.polar(torch.ones_like(theta), theta)[:, None]
    if name == "additive":
        mass = e.exp().cumsum(1)
        return (mass - e.exp()) / mass
    if name == "ssm":
        return (-step(mixer, x)[..., None, :] * mixer.oscillation.logit.exp()).exp()
    for part in name.split("constant_"):
        if part.startswith(("key", "value")) or name == "constant":
            one = one * gate(mixer.oscillation.logit, config)
    if name == "data" or name.endswith("data_key"):
        one = one * gate(projected(mixer, "o_key_proj", x, KEY), config)[..., None]
    if name == "data" or name.endswith("data_value"):
        one = one * gate(projected(mixer, "o_value_proj", x, VALUE), config)[..., None, :]
    return one


def step(mixer: Eos, x: Tensor) -> Tensor:
    down, up = mixer.delta_down_proj, mixer.delta_up_proj
    logit = (x @ down.weight.T) @ up.weight.T + up.bias
    return F.softplus(logit).unflatten(-1, (-1, VALUE))


def literal(mixer: Eos, x: Tensor) -> Tensor:
    """The layer by its equations, token by token, with whole memories."""
    config = mixer.config
    i = projected(mixer, "i_proj", x, VALUE)
    e, s = vector(mixer, "e", config.expand, x), vector(mixer, "s", config.shrink, x)
    o = oscillation(mixer, x, e)
    if config.oscillation == "additive":
        e = e.exp() / e.exp().cumsum(1)
    if config.oscillation == "ssm":
        i = step(mixer, x) * i
    shape = (*x.shape[:2], HEADS, KEY, VALUE)
    o, e, s = o.expand(shape), e.expand(shape), s.expand(shape)
    memory, outputs = torch.zeros_like(o[:, 0]), []
    for t in range(x.shape[1]):
        memory = o[:, t] * memory + e[:, t] * i[:, t, :, None]
        outputs.append((s[:, t] * memory).sum(2))
    y = torch.stack(outputs, 1).flatten(2)
    y = (y.real if y.is_complex() else y).double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return y @ mixer.out_proj.weight.T


SOURCES = [("data", "data"), ("constant", "data"), ("data", "constant"), ("constant", "constant")]
ARMS = [
    (name, expand, shrink)
    for name in get_args(Oscillation)
    for expand, shrink in SOURCES
    if not (name == "additive" and expand == "constant")
]


@pytest.mark.parametrize(("name", "expand", "shrink"), ARMS)
def test_arm_of_the_grid_is_its_equation(name: str, expand: str, shrink: str) -> None:
    mixer = build(oscillation=name, expand=expand, shrink=shrink, temperature=2.0)
    x = torch.randn(2, SEQ, DIM, dtype=torch.float64)
    exact = literal(mixer, x)
    y, state = run(mixer, x)
    assert_close(y, exact)
    first, state = run(mixer, x[:, :4])
    second, state = run(mixer, x[:, 4:], state)
    assert_close(torch.cat([first, second], 1), exact)


@pytest.mark.parametrize("name", get_args(EosActivation))
def test_activation_is_of_expand_and_shrink(name: str) -> None:
    mixer = build(activation=name)
    x = torch.randn(2, SEQ, DIM, dtype=torch.float64)
    assert_close(run(mixer, x)[0], literal(mixer, x))


@pytest.mark.parametrize(("name", "expand", "shrink"), ARMS)
def test_pads_leave_no_trace_in_any_arm(name: str, expand: str, shrink: str) -> None:
    mixer = build(oscillation=name, expand=expand, shrink=shrink)
    x = torch.randn(1, SEQ, DIM, dtype=torch.float64)
    mask = torch.arange(SEQ)[None] % 3 != 0
    y, _ = mixer(x, positions=torch.zeros(1, SEQ, dtype=torch.long), mask=mask)
    assert_close(y[mask][None], run(mixer, x[mask][None])[0])


def test_packed_tokens_of_one_sequence_alone_are_that_sequence() -> None:
    # Constants and tokens both have a seq dim of 1 here.
    mixer = build(expand="constant", oscillation="constant")
    x = torch.randn(1, 1, DIM, dtype=torch.float64)
    bounds = torch.tensor([0, 0, 1])
    y, state = mixer(x, positions=torch.zeros(1, 1, dtype=torch.long), cu_seqlens=bounds)
    exact, exact_state = run(mixer, x)
    assert_close(y, exact)
    assert_close(state[1:], exact_state)
    assert not state[0].any()


def test_steps_begin_between_a_thousandth_and_a_tenth() -> None:
    mixer = build(oscillation="ssm", delta_rank=3)
    assert mixer.delta_down_proj.weight.shape == (3, DIM)
    wide = EosConfig(key_dim=1, oscillation="ssm").build(600, 0, 1, causal=True)
    steps = F.softplus(wide.delta_up_proj.bias)
    assert 0.999e-3 <= steps.min() <= 1.1e-3
    assert 0.09 <= steps.max() <= 0.101
    exact = torch.arange(1.0, KEY + 1).double()[:, None].expand(KEY, VALUE)
    assert_close(mixer.oscillation.logit[0].exp(), exact, limit=1e-6)


def test_operations_count_products_or_entries_of_the_memory() -> None:
    entries = HEADS * KEY * VALUE
    for changes in ({"oscillation": "data"}, {"expand": "constant"}, {"oscillation": "data_value"}):
        assert build(**changes).mixing_flops(1000) == 5 * entries
    assert build().mixing_flops(1000) == HEADS * (2 * 5 * (KEY + VALUE) + 4 * KEY * VALUE)
    phase = build(oscillation="phase").mixing_flops(1000)
    assert phase == HEADS * (2 * 6 * (2 * KEY + VALUE) + 4 * 2 * KEY * VALUE)


def test_decays_and_angles_survive_a_cast() -> None:
    for name in ("constant", "slopes", "phase", "ssm"):
        exact, cast = build(oscillation=name), build(oscillation=name).bfloat16()
        for x, y in zip(
            exact.oscillation.state_dict().values(), cast.oscillation.state_dict().values()
        ):
            assert y.dtype == torch.float32
            assert_close(y, x, limit=1e-7)
        # What multiplies positions is never rounded.
        if name in ("slopes", "phase"):
            assert torch.equal(cast.oscillation(), exact.oscillation())
        assert cast.oscillation().dtype.itemsize >= 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="expected causal=True"):
        EosConfig().build(DIM, 0, 1, causal=False)
    with pytest.raises(ValueError, match=r"heads is 5.*divisor of 12"):
        build(heads=5)
    for changes in ({"expand": "constant"}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="with oscillation 'additive'"):
            build(oscillation="additive", **changes)
