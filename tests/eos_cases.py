"""Calls of eos for its tests: every implementation with every form that it takes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops import eos

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4
REAL, COMPLEX = torch.float64, torch.complex128


class EosCase(NamedTuple):
    """Arguments of one call, float64; oscillation is o or log_o, see ``name``."""

    i: Tensor
    e: Tensor
    s: Tensor
    oscillation: Tensor
    state: Tensor
    name: str
    psi: str

    def run(self, implementation: str = "auto", **changes: Any) -> tuple[Tensor, Tensor]:
        """y and the last state, with some arguments replaced."""
        case = self._replace(**changes)
        return eos(
            case.i,
            case.e,
            case.s,
            state=case.state,
            psi=case.psi,
            implementation=implementation,
            **{case.name: case.oscillation},
        )

    def part(self, start: int, stop: int) -> "EosCase":
        """The same case on a part of the sequence; constants stay."""
        cut = [x[:, start:stop] if x.dim() and x.shape[1] > 1 else x for x in self[:4]]
        return self._replace(i=cut[0], e=cut[1], s=cut[2], oscillation=cut[3])


# form -> (psi, complex oscillation, complex i, e, s, shape of the oscillation after batch and seq,
# o varies along batch and seq, e and s vary along batch and seq, implementations)
_FORMS: dict[str, tuple[str, bool, bool, tuple[int, ...], bool, bool, tuple[str, ...]]] = {
    "constant": ("diag", False, False, (HEADS, 1, 1), False, True, ("attention", "scan")),
    "scalar": ("diag", False, False, (), False, True, ("attention", "scan")),
    "constant-key": ("diag", False, False, (HEADS, KEY, 1), False, True, ("attention", "scan")),
    "token": ("diag", False, False, (HEADS, 1, 1), True, True, ("attention", "scan")),
    "key": ("diag", False, False, (HEADS, KEY, 1), True, True, ("attention", "scan")),
    "value": ("diag", False, False, (HEADS, 1, VALUE), True, True, ("scan",)),
    "full": ("diag", False, False, (HEADS, KEY, VALUE), True, True, ("scan",)),
    "phase": ("diag", True, False, (HEADS, KEY, 1), False, True, ("doubled", "scan")),
    "scalar-phase": ("diag", True, False, (), False, True, ("doubled", "scan")),
    "token-phase": ("diag", True, False, (HEADS, KEY, 1), True, True, ("doubled", "scan")),
    "all-complex": ("diag", True, True, (HEADS, KEY, 1), True, True, ("doubled", "scan")),
    "complex-full": ("diag", True, True, (1, KEY, VALUE), True, True, ("scan",)),
    "filter": ("diag", False, False, (HEADS, KEY, 1), False, False, ("convolution", "scan")),
    "complex-filter": (
        "diag",
        True,
        True,
        (HEADS, KEY, VALUE),
        False,
        False,
        ("convolution", "scan"),
    ),
    "matrix": ("matmul", False, False, (HEADS, KEY, KEY), True, True, ("scan",)),
    "complex-matrix": ("matmul", True, True, (1, KEY, KEY), False, True, ("scan",)),
    "matrix-filter": (
        "matmul",
        False,
        False,
        (HEADS, KEY, KEY),
        False,
        False,
        ("convolution", "scan"),
    ),
}
FORMS = tuple(_FORMS)
PAIRS = [(form, name) for form, fields in _FORMS.items() for name in (*fields[-1], "auto")]


def make_case(form: str, seq: int, dtype: torch.dtype = REAL) -> EosCase:
    """A random case; ``dtype`` is that of real inputs."""
    psi, is_complex, all_complex, shape, per_token, per_token_vectors, _ = _FORMS[form]
    lead = (BATCH, seq) if per_token else (1, 1)
    shape = (*lead, *shape) if shape else ()
    log_o = -torch.rand(shape, dtype=REAL)
    if is_complex:
        log_o = torch.complex(log_o, 2.0 * torch.randn(shape, dtype=REAL))
    name = "log_o"
    if psi == "matmul":
        name, log_o = "o", 0.3 * torch.randn(shape, dtype=COMPLEX if is_complex else REAL)
    lead = (BATCH, seq) if per_token_vectors else (1, 1)
    kind = COMPLEX if all_complex else REAL
    case = EosCase(
        torch.randn(BATCH, seq, HEADS, VALUE, dtype=kind),
        torch.randn(*lead, HEADS, KEY, dtype=kind),
        torch.randn(*lead, 1 if form == "filter" else HEADS, KEY, dtype=kind),
        log_o,
        torch.randn(BATCH, HEADS, KEY, VALUE, dtype=COMPLEX if is_complex else REAL),
        name,
        psi,
    )
    if dtype == REAL:
        return case
    to = {REAL: dtype, COMPLEX: torch.complex64}
    wide = {REAL: torch.float32, COMPLEX: torch.complex64}
    i, e, s = (x.to(to[x.dtype]) for x in case[:3])
    log_o, state = (x.to(wide[x.dtype]) for x in case[3:5])
    return case._replace(i=i, e=e, s=s, oscillation=log_o, state=state)


def parts(x: Tensor) -> Tensor:
    """Real and imaginary part side by side; a real tensor as it is."""
    return torch.view_as_real(x) if x.is_complex() else x
