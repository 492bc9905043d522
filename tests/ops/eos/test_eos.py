"""eos: its implementations against the recurrence, its state, gradients, limits and errors."""

import cmath
import importlib
import math
from collections.abc import Callable

import oracles_eos as oracles
import pytest
import torch
from eos_cases import BATCH, FORMS, HEADS, KEY, PAIRS, VALUE, EosCase, make_case, parts
from tolerances import EOS_FLOAT32, GRADIENT, assert_close, relative_error

from transnormer.ops import eos

# The package exports a function of the same name.
scan = importlib.import_module("transnormer.ops.eos.scan")
NAN, INF = float("nan"), float("inf")


def check(actual: tuple, exact: tuple, limit: float | None = None) -> None:
    for name, x, y in zip(("y", "state"), actual, exact):
        assert_close(parts(x), parts(y), limit=limit, name=name)


def literal(case: EosCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token, in complex128."""
    o = case.oscillation.exp() if case.name == "log_o" else case.oscillation
    o = o.to(torch.complex128)
    last = (KEY, KEY) if case.psi == "matmul" else (KEY, VALUE)
    o = o.expand(*case.i.shape[:3], *last)
    e, s = (x.expand(*case.i.shape[:3], KEY).to(o.dtype) for x in (case.e, case.s))
    memory, outputs = case.state.to(o.dtype), []
    for t in range(case.i.shape[1]):
        before = o[:, t] @ memory if case.psi == "matmul" else o[:, t] * memory
        memory = before + torch.einsum("bhk,bhv->bhkv", e[:, t], case.i[:, t].to(o.dtype))
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, s[:, t]).real)
    return torch.stack(outputs, 1), memory if case.state.is_complex() else memory.real


@pytest.mark.parametrize("form", FORMS)
def test_reference_is_the_definition(form: str) -> None:
    case = make_case(form, 9)
    check(case.run("reference"), literal(case))


@pytest.mark.parametrize("seq", [1, 40])
@pytest.mark.parametrize(("form", "name"), PAIRS)
def test_implementation_equals_the_reference(form: str, name: str, seq: int) -> None:
    case = make_case(form, seq)
    check(case.run(name), case.run("reference"))
    check(case.run(name, state=None), case.run("reference", state=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "name"), PAIRS)
def test_lower_precision_keeps_wide_sums(form: str, name: str, dtype: torch.dtype) -> None:
    case = make_case(form, 40, dtype)
    y, state = case.run(name)
    real = case.i.dtype if not case.i.is_complex() else torch.float32
    assert y.dtype == real
    assert state.dtype == (torch.complex64 if case.state.is_complex() else torch.float32)
    wide = {x.dtype: x.to(torch.complex128 if x.is_complex() else torch.float64) for x in case[:5]}
    exact = case._replace(
        **{
            field: getattr(case, field).to(wide[getattr(case, field).dtype].dtype)
            for field in ("i", "e", "s", "oscillation", "state")
        }
    ).run("reference")
    # Keys of a phase are turned in float32 and rounded to the inputs' dtype for the kernels.
    half = name in ("doubled", "auto") and case.state.is_complex() and dtype == torch.bfloat16
    limit = 2 * torch.finfo(torch.bfloat16).eps if half else EOS_FLOAT32
    assert_close(y, exact[0], limit=max(limit, torch.finfo(real).eps), name="y")
    assert_close(parts(state), parts(exact[1]), limit=limit, name="state")


@pytest.mark.parametrize("cut", [1, 13])
@pytest.mark.parametrize(("form", "name"), PAIRS)
def test_a_split_sequence_continues_from_its_state(form: str, name: str, cut: int) -> None:
    case = make_case(form, 40)
    before = case.state.clone()
    first, state = case.part(0, cut).run(name)
    second, state = case.part(cut, 40).run(name, state=state)
    check((torch.cat([first, second], 1), state), case.run(name))
    assert torch.equal(case.state, before)


@pytest.mark.parametrize(
    ("form", "name", "few"),
    [(*p, scan.FEW_ENTRIES) for p in PAIRS if p[1] != "auto"]
    + [(*p, 0) for p in PAIRS if p[1] == "scan"],
)
def test_gradients_are_the_functions_own(
    form: str, name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "LONGEST_CHUNK", 2)
    monkeypatch.setattr(scan, "FEW_ENTRIES", few)
    case = make_case(form, 4)
    part = [x[:1, ..., :2] if x.dim() == 4 else x for x in case[:3]]
    log_o, state = case.oscillation, case.state[:1, :, :2, :2]
    if log_o.dim():
        log_o = log_o[:1, ..., :2, :2]
    leaves = [x.detach().clone().requires_grad_() for x in (*part, log_o, state)]

    def run(i, e, s, log_o, state):
        return case.run(name, i=i, e=e, s=s, oscillation=log_o, state=state)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", ["scan", "reference"])
def test_gradient_of_o_uses_the_memory_before_the_token(name: str) -> None:
    case = make_case("full", 12)
    o = case.oscillation.exp()
    leaves = [x.clone().requires_grad_() for x in (case.i, case.e, case.s, o)]
    y, state = eos(*leaves, implementation=name)
    dy, d_last = torch.randn_like(y), torch.randn_like(state)
    ((y * dy).sum() + (state * d_last).sum()).backward()
    exact = oracles.eos_gradients(*(x.detach() for x in leaves), dy, d_last)
    for x, gradient in zip(leaves, exact):
        assert_close(x.grad, gradient, limit=GRADIENT[torch.float64])


@pytest.mark.parametrize("few", [0, scan.FEW_ENTRIES], ids=["token-by-token", "doubling"])
@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("form", ["full", "scalar", "complex-full", "matrix"])
def test_chunks_of_any_size_are_the_same(
    form: str, size: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(form, 40)
    leaves = [x.clone().requires_grad_() for x in case[:5]]
    exact = case._replace(**dict(zip(case._fields, leaves))).run("reference")
    monkeypatch.setattr(scan, "LONGEST_CHUNK", size)
    monkeypatch.setattr(scan, "FEW_ENTRIES", few)
    actual = case._replace(**dict(zip(case._fields, leaves))).run("scan")
    check(actual, exact)
    weights = [torch.randn_like(parts(x)) for x in exact]
    gradients = [
        torch.autograd.grad(sum((parts(x) * w).sum() for x, w in zip(results, weights)), leaves)
        for results in (actual, exact)
    ]
    for x, y in zip(*gradients):
        assert_close(parts(x), parts(y), limit=GRADIENT[torch.float64])


def test_large_states_get_short_chunks() -> None:
    assert scan._chunk_size(1) == scan.LONGEST_CHUNK
    assert scan._chunk_size(scan.CHUNK_ENTRIES // 4) == 4
    assert scan._chunk_size(scan.CHUNK_ENTRIES * 4) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("form", "name"), [p for p in PAIRS if "matrix" not in p[0]])
def test_strong_decay_stays_finite_and_right(form: str, name: str, dtype: torch.dtype) -> None:
    case = make_case(form, 256, dtype)
    log_o = torch.where(
        torch.rand(case.oscillation.shape) < 0.8, math.log(1e-3), parts_real(case.oscillation)
    )
    if case.oscillation.is_complex():
        log_o = torch.complex(log_o, case.oscillation.imag)
    case = case._replace(oscillation=log_o)
    exact = case._replace(
        **{
            field: getattr(case, field).to(
                torch.complex128 if getattr(case, field).is_complex() else torch.float64
            )
            for field in ("i", "e", "s", "oscillation", "state")
        }
    ).run("reference")
    limit = 1e-12 if dtype == torch.float64 else EOS_FLOAT32
    check(case.run(name), exact, limit)


def parts_real(x: torch.Tensor) -> torch.Tensor:
    return x.real if x.is_complex() else x


@pytest.mark.parametrize(("form", "name"), [p for p in PAIRS if "matrix" not in p[0]])
def test_minus_infinity_forgets_everything(form: str, name: str) -> None:
    case = make_case(form, 20)
    log_o = torch.full_like(parts_real(case.oscillation), -INF)
    if case.oscillation.is_complex():
        log_o = torch.complex(log_o, torch.ones_like(log_o))
    log_o.requires_grad_()
    y, state = case.run(name, oscillation=log_o)
    own = (case.e * case.s).sum(-1, keepdim=True) * case.i
    assert_close(y, parts_real(own))
    (y.sum() + parts(state).sum()).backward()
    assert not parts_real(log_o.grad).any()
    # "doubled" turns e and s by the phase and takes the difference of the two gradients.
    assert log_o.grad.abs().max() < 1e-12


def test_a_phase_is_as_exact_after_many_tokens() -> None:
    theta = torch.tensor([[0.7, 1e-4]], dtype=torch.float32)
    log_o = torch.complex(torch.zeros_like(theta), theta)[None, None, ..., None]
    i = torch.zeros(1, 20_000, 1, 1)
    i[:, 0] = 1.0
    e = s = torch.ones(1, 1, 1, 2)
    exact = (19_999.0 * theta.double()).cos().sum().item()
    for name in ("convolution", "doubled"):
        y, _ = eos(i, e, s, log_o=log_o, implementation=name)
        assert abs(y[0, -1, 0, 0].item() - exact) < 1e-5
    each = log_o.expand(1, 20_000, 1, 2, 1).contiguous()
    y, _ = eos(i, e, s, log_o=each, implementation="doubled")
    assert abs(y[0, -1, 0, 0].item() - exact) < 1e-5


def test_single_values_take_the_scan() -> None:
    case = make_case("key", 10)
    i, state = case.i[..., :1], case.state[..., :1]
    results = [case.run(name, i=i, state=state) for name in ("auto", "scan", "attention")]
    assert torch.equal(results[0][0], results[1][0])
    check(results[0], results[2])


def test_numbers_are_oscillations() -> None:
    case = make_case("constant", 11)
    shape = (1, 1, 1, 1, 1)
    for number in (1.0, 1, 0.5, 0.0, -0.5, 2.0, 0.6 + 0.5j, 1.0 + 0.0j, 0j, 1.5j):
        kind = torch.complex128 if isinstance(number, complex) else torch.float64
        state = case.state.to(kind)
        o = torch.full(shape, number, dtype=kind)
        exact = eos(case.i, case.e, case.s, o, state=state, implementation="reference")
        check(eos(case.i, case.e, case.s, number, state=state), exact)
        check(eos(case.i, case.e, case.s, o.view(()), state=state, psi="matmul"), exact)
    exact = eos(case.i, case.e, case.s, math.exp(-0.3))
    check(eos(case.i, case.e, case.s, log_o=-0.3), exact)
    check(eos(case.i, case.e, case.s, log_o=torch.tensor(-0.3, dtype=torch.float64)), exact)


def test_expanded_tensors_are_constants() -> None:
    case = make_case("filter", 30)
    whole = (BATCH, 30, HEADS)
    e, s = (x.expand(*whole, KEY) for x in (case.e, case.s))
    log_o = case.oscillation.expand(*whole, KEY, VALUE)
    check(
        eos(case.i, e, s, log_o=log_o, state=case.state, implementation="convolution"),
        case.run("reference"),
    )
    with pytest.raises(NotImplementedError, match="'convolution': e, s or o varies along seq"):
        eos(case.i, e.contiguous(), s, log_o=log_o, implementation="convolution")


def test_an_empty_sequence_hands_its_state_on() -> None:
    case = make_case("phase", 4).part(0, 0)
    y, state = case.run()
    assert y.shape == (BATCH, 0, HEADS, VALUE)
    assert torch.equal(state, case.state)
    assert not case.run(state=None)[1].any()


@pytest.mark.parametrize("form", ["full", "phase", "complex-filter"])
def test_compiles_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LONGEST_CHUNK", 4)
    case = make_case(form, 10)

    def run(i, e, s, log_o, state):
        return case.run(i=i, e=e, s=s, oscillation=log_o, state=state)

    inputs = [x.clone().requires_grad_() for x in case[:5]]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    exact, actual = run(*inputs), compiled(*inputs)
    check(actual, exact)
    gradients = [
        torch.autograd.grad(y.sum() + parts(state).sum(), inputs) for y, state in (exact, actual)
    ]
    for x, y in zip(*gradients):
        assert relative_error(parts(y), parts(x)) < 1e-12


def test_complex_numbers_of_modulus_1_are_taken() -> None:
    i, e, s = (torch.randn(1, 6, 1, 4, dtype=torch.float64) for _ in range(3))
    for turn in range(40):
        o = cmath.exp(1j * turn / 7)
        exact = eos(i, e, s, o, implementation="reference")
        check(eos(i, e, s, o), exact)


@pytest.mark.parametrize("number", [0.9, 0.6 - 0.7j, 1.5j, 0j])
def test_compiles_whole_with_a_number(number: complex) -> None:
    i, e, s = (torch.randn(1, 6, 1, 4) for _ in range(3))
    compiled = torch.compile(lambda *x: eos(*x, number), backend="aot_eager", fullgraph=True)
    check(compiled(i, e, s), eos(i, e, s, number), 0.0)


def test_autocast_rounds_the_inputs_and_not_the_sums() -> None:
    case = make_case("full", 20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = case.run()
    i, e, s = (x.bfloat16() for x in case[:3])
    exact = case.run(i=i, e=e, s=s)
    assert y.dtype == torch.bfloat16
    check((y, state), exact, 0.0)


def test_autocast_leaves_what_stands_beside_a_complex_input() -> None:
    case = make_case("phase", 20, torch.float32)
    case = case._replace(i=torch.complex(case.i, case.i.flip(1)))
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run()
    assert found[0].dtype == torch.float32
    check(found, case.run(), 0.0)


def arguments(**changes: object) -> dict[str, object]:
    case = make_case("key", 6)
    valid = {"i": case.i, "e": case.e, "s": case.s, "log_o": case.oscillation, "state": case.state}
    return valid | changes


ONES = torch.zeros(BATCH, 6, HEADS, KEY, VALUE, dtype=torch.float64)
WRONG: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("i-rank", {"i": torch.ones(2, 6, 3).double()}, ValueError, "i has shape"),
    ("i-integers", {"i": torch.ones(2, 6, 3, 4).long()}, TypeError, "i is torch.int64"),
    ("i-batch-0", {"i": torch.ones(0, 6, 3, 4).double()}, ValueError, "batch is 0"),
    ("e-list", {"e": [1.0]}, TypeError, "e is list; expected a tensor"),
    ("e-seq", {"e": torch.ones(2, 5, 3, 5).double()}, ValueError, "e has shape"),
    ("e-dtype", {"e": torch.ones(2, 6, 3, 5)}, TypeError, "e is torch.float32; expected"),
    ("s-key", {"s": torch.ones(2, 6, 3, 4).double()}, ValueError, "s has shape"),
    ("s-key-1", {"s": torch.ones(2, 6, 3, 1).double()}, ValueError, "key_dim of s is 1"),
    ("none", {"log_o": None}, ValueError, "of o and log_o neither is given"),
    ("both", {"o": 1.0}, ValueError, "of o and log_o both is given"),
    ("o-rank", {"log_o": -torch.rand(3).double()}, ValueError, "log_o has shape"),
    ("o-seq", {"log_o": ONES[:, :5]}, ValueError, "log_o has shape"),
    ("o-type", {"log_o": "0.5"}, TypeError, "log_o is '0.5'"),
    ("o-bool", {"log_o": True}, TypeError, "log_o is True"),
    ("o-integers", {"log_o": ONES.long()}, TypeError, "log_o is torch.int64"),
    ("positive", {"log_o": ONES + 0.5}, ValueError, "log_o holds real part 0.5"),
    ("positive-complex", {"log_o": ONES + 0.5 + 1j}, ValueError, "log_o holds real part 0.5"),
    ("positive-number", {"log_o": 0.5}, ValueError, "log_o is 0.5; expected a real part <= 0"),
    ("nan", {"log_o": ONES * NAN}, ValueError, "log_o holds NaN"),
    ("nan-number", {"log_o": NAN}, ValueError, "log_o is nan"),
    ("psi", {"psi": "outer"}, ValueError, "psi is 'outer'"),
    ("log-matrix", {"psi": "matmul", "log_o": ONES}, ValueError, "with psi 'matmul'"),
    ("matrix", {"psi": "matmul", "log_o": None, "o": ONES}, ValueError, "o has shape"),
    (
        "matrix-broadcast",
        {"psi": "matmul", "log_o": None, "o": ONES[..., :1, :1]},
        ValueError,
        "o ends in",
    ),
    ("complex-e", {"e": torch.ones(2, 6, 3, 5).to(torch.complex128)}, TypeError, "o is real"),
    ("state-shape", {"state": ONES[:, 0, :2]}, ValueError, "state has shape"),
    ("state-real", {"state": ONES[:, 0].float()}, TypeError, "state is torch.float32"),
    ("state-complex", {"state": ONES[:, 0] * 1j}, TypeError, "state is torch.complex128"),
    ("state-for-phase", {"log_o": ONES * 1j}, TypeError, "state is torch.float64"),
    ("name", {"implementation": "fft"}, ValueError, "implementation of eos is 'fft'"),
    ("doubled", {"implementation": "doubled"}, NotImplementedError, "o is real"),
    (
        "full",
        {"implementation": "attention", "log_o": -torch.rand_like(ONES)},
        NotImplementedError,
        "o varies along value_dim",
    ),
    (
        "tensor",
        {"implementation": "attention", "log_o": None, "o": ONES[..., :1]},
        NotImplementedError,
        "o is a tensor, of any size",
    ),
    (
        "attention-matrix",
        {
            "implementation": "attention",
            "psi": "matmul",
            "log_o": None,
            "o": torch.zeros(1, 1, 1, 5, 5).double(),
        },
        NotImplementedError,
        "psi is 'matmul'",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_wrong_arguments_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        eos(**arguments(**changes))


@pytest.mark.parametrize("make", [lambda x: torch.compile(x, backend="eager"), lambda x: x])
def test_meta_tensors_give_shapes(make: Callable) -> None:
    case = make_case("full", 40)
    meta = {f: getattr(case, f).to("meta") for f in ("i", "e", "s", "oscillation", "state")}
    y, state = make(case._replace(**meta).run)()
    assert y.shape == case.i.shape
    assert state.shape == case.state.shape
