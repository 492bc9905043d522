"""Every model of the table as a row of eos equals its own equation, in float64."""

import math
from collections.abc import Callable

import oracles_eos as oracles
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from transnormer.ops.eos import rows, rows_state_space
from transnormer.ops.eos.row import EosRow

BATCH, SEQ, HEADS, KEY, VALUE = 2, 17, 3, 4, 5


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cplx(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def keys() -> Tensor:
    return real(BATCH, SEQ, HEADS, KEY)


def values() -> Tensor:
    return real(BATCH, SEQ, HEADS, VALUE)


def gates(dim: int = KEY) -> Tensor:
    return F.logsigmoid(real(BATCH, SEQ, HEADS, dim))


Case = tuple[EosRow, Tensor]


def linear_attention() -> Case:
    q, k, v = keys(), keys(), values()
    exact = oracles.pairs(q, k, v, torch.ones((1,) * 5, dtype=torch.float64))
    return rows.linear_attention(q, k, v), exact


def tnl() -> Case:
    q, k, v, log_decay = keys(), keys(), values(), -torch.rand(HEADS, dtype=torch.float64)
    weight = (log_decay[:, None] * oracles.distances(SEQ)).exp()
    return rows.tnl(q, k, v, log_decay), oracles.pairs(q, k, v, weight)


def retnet_arguments() -> tuple[Tensor, ...]:
    theta = 10_000.0 ** -torch.linspace(0, 1, KEY // 2, dtype=torch.float64)
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS, dtype=torch.float64))))
    return keys(), keys(), values(), log_decay, theta


def retnet() -> Case:
    arguments = retnet_arguments()
    return rows.retnet(*arguments), oracles.retention(*arguments)


def lrpe_cos() -> Case:
    arguments = keys(), keys(), values(), real(HEADS, KEY)
    return rows.lrpe_cos(*arguments), oracles.lrpe(*arguments)


def lrpe_cos_with_decay() -> Case:
    log_decay = -torch.rand(HEADS, dtype=torch.float64)
    arguments = keys(), keys(), values(), real(HEADS, KEY), log_decay
    return rows.lrpe_cos(*arguments), oracles.lrpe(*arguments)


def cosformer() -> Case:
    arguments = keys(), keys(), values(), 32
    return rows.cosformer(*arguments), oracles.cosformer(*arguments)


def cosformer2() -> Case:
    q, k, v, theta = keys(), keys(), values(), real(HEADS, KEY)
    return rows.cosformer2(q, k, v, theta), oracles.lrpe(F.silu(q), F.silu(k), v, theta)


def gla() -> Case:
    q, k, v, log_gate = keys(), keys(), values(), gates()
    exact = oracles.pairs(q, k, v, oracles.products(log_gate.exp()))
    return rows.gla(q, k, v, log_gate), exact


def gateloop() -> Case:
    arguments = keys(), keys(), values(), gates(), keys()
    return rows.gateloop(*arguments), oracles.gateloop(*arguments)


def outer_gate() -> Case:
    arguments = keys(), keys(), values(), gates(), gates(VALUE)
    return rows.outer_gate(*arguments), oracles.outer_gate(*arguments)


def hgrn2() -> Case:
    q, v, log_forget = keys(), values(), gates()
    f = log_forget.exp()
    return rows.hgrn2(q, v, log_forget), oracles.pairs(q, 1 - f, v, oracles.products(f))


def hgrn1() -> Case:
    arguments = cplx(BATCH, SEQ, HEADS, VALUE), gates(VALUE), real(HEADS, VALUE)
    return rows.hgrn1(*arguments), oracles.hgrn1(*arguments)[0]


def hgrn1_imaginary() -> Case:
    c, log_forget, theta = cplx(BATCH, SEQ, HEADS, VALUE), gates(VALUE), real(HEADS, VALUE)
    return rows.hgrn1(-1j * c, log_forget, theta), oracles.hgrn1(c, log_forget, theta)[1]


def lightnet() -> Case:
    arguments = keys(), 3 * keys(), values()
    return rows.lightnet(*arguments), oracles.lightnet(*arguments)


def lightnet_bidirectional() -> Case:
    q, k, v = keys(), 3 * keys(), values()
    memory = torch.einsum("bshj,bshv->bhjv", torch.softmax(k, 1), v)
    exact = torch.einsum("bthj,bhjv->bthv", q, memory)
    return rows.lightnet_bidirectional(q, k, v), exact


def deltanet() -> Case:
    arguments = keys(), keys(), values(), real(BATCH, SEQ, HEADS).sigmoid()
    return rows.deltanet(*arguments), oracles.deltanet(*arguments)


def mamba() -> Case:
    delta, a = F.softplus(values()), -real(HEADS, KEY, VALUE).exp()
    arguments = values(), delta, a, keys(), keys()
    return rows_state_space.mamba(*arguments), oracles.mamba(*arguments)


def poles() -> Tensor:
    imag = math.pi * torch.arange(KEY, dtype=torch.float64)
    return torch.complex(
        torch.full((HEADS, KEY), -0.5, dtype=torch.float64), imag.expand(HEADS, -1)
    )


def steps() -> Tensor:
    return torch.rand(HEADS, dtype=torch.float64) * 0.3 + 0.01


def s4d() -> Case:
    arguments = real(BATCH, SEQ, HEADS), steps(), poles(), cplx(HEADS, KEY), cplx(HEADS, KEY)
    return rows_state_space.s4d(*arguments), oracles.s4d(*arguments)


def s4() -> Case:
    low_rank = cplx(HEADS, KEY)
    vectors = low_rank, low_rank, cplx(HEADS, KEY), cplx(HEADS, KEY)
    arguments = real(BATCH, SEQ, HEADS), steps(), poles(), *vectors
    return rows_state_space.s4(*arguments), oracles.s4(*arguments)


def s5_arguments() -> tuple[Tensor, ...]:
    return real(BATCH, SEQ, HEADS), (0.3 * poles()[0]).exp(), cplx(KEY, HEADS), cplx(VALUE, KEY)


def s5_diagonal() -> Case:
    u, a, b, c = s5_arguments()
    return rows_state_space.s5(u, a, b, c), oracles.s5(u, a.diag(), b, c)


def s5_dense() -> Case:
    u, a, b, c = s5_arguments()
    basis = torch.linalg.qr(cplx(KEY, KEY))[0]
    a = basis @ a.diag() @ basis.conj().T
    return rows_state_space.s5(u, a, b, c), oracles.s5(u, a, b, c)


def rwkv4() -> Case:
    decay, bonus = torch.rand(HEADS, VALUE, dtype=torch.float64), real(HEADS, VALUE)
    arguments = values(), values(), decay, bonus
    return rows_state_space.rwkv4(*arguments), oracles.rwkv4(*arguments)


def tnn_exact() -> Case:
    arguments = values(), real(HEADS, SEQ)
    return rows_state_space.tnn_exact(*arguments), oracles.toeplitz(*arguments)


def tnn_exact_longer_than_its_kernel() -> Case:
    arguments = values(), real(HEADS, 5)
    return rows_state_space.tnn_exact(*arguments), oracles.toeplitz(*arguments)


def tnn_diagonal() -> Case:
    arguments = values(), real(HEADS, SEQ)
    radius = math.exp(-3 / SEQ)
    return rows_state_space.tnn_diagonal(*arguments, radius), oracles.toeplitz(*arguments)


# case -> the implementation that "auto" takes for it
CASES: dict[Callable[[], Case], str] = {
    linear_attention: "attention",
    tnl: "attention",
    retnet: "doubled",
    lrpe_cos: "doubled",
    lrpe_cos_with_decay: "doubled",
    cosformer: "doubled",
    cosformer2: "doubled",
    gla: "attention",
    gateloop: "doubled",
    outer_gate: "scan",
    hgrn2: "attention",
    hgrn1: "scan",
    hgrn1_imaginary: "scan",
    lightnet: "attention",
    lightnet_bidirectional: "attention",
    deltanet: "scan",
    mamba: "scan",
    s4d: "convolution",
    s4: "convolution",
    s5_diagonal: "convolution",
    s5_dense: "scan",
    rwkv4: "convolution",
    tnn_exact: "convolution",
    tnn_exact_longer_than_its_kernel: "convolution",
    tnn_diagonal: "convolution",
}
NAMES = [case.__name__ for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_row_equals_the_models_own_equation(case: Callable[[], Case]) -> None:
    row, exact = case()
    assert_close(row.run()[0], exact)
    assert_close(row.run(implementation="reference")[0], exact)


@pytest.mark.parametrize(("case", "name"), CASES.items(), ids=NAMES)
def test_row_runs_on_the_implementation_made_for_it(
    case: Callable[[], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module, taken = sys.modules["transnormer.ops.eos"], []
    spied = [
        row._replace(run=lambda call, row=row: taken.append(row.name) or row.run(call))
        for row in module.IMPLEMENTATIONS
    ]
    monkeypatch.setattr(module, "IMPLEMENTATIONS", spied)
    case()[0].run()
    assert taken == [name]


def test_retention_with_the_other_sign_of_the_phase_is_another_model() -> None:
    arguments = retnet_arguments()
    row, exact = rows.retnet(*arguments), oracles.retention(*arguments)
    wrong = row._replace(log_o=row.log_o.conj()).run()[0]
    assert (wrong - exact).abs().max() > 0.1
    # With the conjugate on the key instead of the query, that sign is the right one.
    mirrored = row._replace(e=row.e.conj(), s=row.s.conj(), log_o=row.log_o.conj())
    assert_close(mirrored.run()[0], exact)


def test_lrpe_equals_real_features_without_oscillation() -> None:
    q, k, v, theta = keys(), keys(), values(), real(HEADS, KEY)
    angles = torch.arange(SEQ, dtype=torch.float64)[:, None, None] * theta
    doubled = [torch.cat([x * angles.cos(), x * angles.sin()], -1) for x in (q, k)]
    exact = rows.linear_attention(*doubled, v).run()[0]
    assert_close(rows.lrpe_cos(q, k, v, theta).run()[0], exact)


def test_last_causal_memory_of_lightnet_is_the_bidirectional_one() -> None:
    q, k, v = keys(), keys(), values()
    _, causal = rows.lightnet(q, k, v).run()
    _, whole = rows.lightnet_bidirectional(q, k, v).run()
    assert_close(causal, whole)


def test_lightnet_continues_from_memory_and_mass() -> None:
    q, k, v = keys(), 3 * keys(), values()
    exact, exact_state = rows.lightnet(q, k, v).run()
    parts = [x.split([6, SEQ - 6], 1) for x in (q, k, v)]
    _, _, mass = rows.additive_gates(parts[1][0])
    first, state = rows.lightnet(*(x[0] for x in parts)).run()
    second, state = rows.lightnet(*(x[1] for x in parts), mass).run(state)
    assert_close(torch.cat([first, second], 1), exact)
    assert_close(state, exact_state)


def test_pads_have_no_weight_in_the_additive_gates() -> None:
    k = keys()
    padded = torch.cat([torch.full_like(k[:, :3], -torch.inf), k], 1)
    expand, log_decay, mass = rows.additive_gates(padded)
    exact = rows.additive_gates(k)
    assert not expand[:, :3].any()
    assert not expand.isnan().any()
    assert not log_decay.isnan().any()
    assert_close(expand[:, 3:], exact[0])
    assert torch.equal(log_decay[:, 3], exact[1][:, 0])
    assert_close(log_decay[:, 4:], exact[1][:, 1:])
    assert_close(mass, exact[2])


def test_poles_of_a_long_convolution_hold_for_one_kernel_length() -> None:
    with pytest.raises(ValueError, match="seq is 17; expected at most 16"):
        rows_state_space.tnn_diagonal(values(), real(HEADS, 16), 0.9)
    with pytest.raises(ValueError, match=r"radius is 1\.5"):
        rows_state_space.tnn_diagonal(values(), real(HEADS, SEQ), 1.5)
