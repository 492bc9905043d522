"""Launches that are prepared once: which calls share them, and what they then hand to the kernel."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from kernel_cases import needs_interpreter
from torch import Tensor

pytestmark = needs_interpreter


class Compiled:
    """What Triton's JIT returns: launches without another look at what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given: self.calls.append((grid, *given))


class Kernel:
    """Triton's JIT, which compiles anew at every call."""

    arg_names = ("x", "y", "n", "BLOCK", "FIRST")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.made: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any, **constants: Any) -> Compiled:
            self.calls.append((grid, given, constants))
            self.made.append(Compiled())
            return self.made[-1]

        return run


def inputs(**changes: Any) -> dict[str, Any]:
    q, k, v = (torch.zeros(1, 70, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    given = {
        "q": q, "k": k, "v": v, "log_decay": torch.zeros(2), "cu_seqlens": None, "scale": 1.0,
        "reverse": False, "backward": False, "in_parts": False,
    }  # fmt: skip
    return given | changes


def form() -> Any:
    from transnormer.ops.linear_attention.triton_form import form_of

    return form_of(**inputs())


def aligned(x: Tensor) -> Tensor:
    return x[(-x.data_ptr() // x.element_size()) % (16 // x.element_size()) :]


def test_a_second_launch_goes_to_the_compiled_kernel() -> None:
    made, kernel = form(), Kernel()
    x, y = aligned(torch.zeros(20)), aligned(torch.ones(20))

    def rest() -> Any:
        return kernel, 7, (5,), {"FIRST": True, "num_warps": 4, "BLOCK": 64}

    for given in ((x, None), (y, None)):
        made.launch("one", given, rest)
    assert kernel.calls == [
        ((7,), (x, None, 5), {"FIRST": True, "num_warps": 4, "BLOCK": 64}),
    ]
    # In the order of the kernel's arguments; options are compiled in.
    ((grid, first, *others),) = kernel.made[0].calls
    assert (grid, others) == ((7, 1, 1), [None, 5, 64, True])
    assert first is y
    made.launch("another", (x, y), rest)
    assert len(kernel.calls) == 2


@pytest.mark.parametrize("first", [True, False])
def test_an_address_that_16_does_not_divide_goes_to_the_jit(first: bool) -> None:
    made, kernel = form(), Kernel()
    x = aligned(torch.zeros(24))
    given = [(x[1:], x), (x, x)] if first else [(x, x), (x[1:], x)]
    for tensors in (*given, given[1]):
        made.launch("one", tensors, lambda: (kernel, 1, (5,), {"FIRST": True, "BLOCK": 64}))
    assert len(kernel.calls) == (2 if first else 3)
    assert sum(len(compiled.calls) for compiled in kernel.made) == (1 if first else 0)


def test_the_interpreter_remembers_nothing() -> None:
    from transnormer.ops import linear_attention
    from transnormer.ops.linear_attention import triton_form

    before = triton_form._remembered.cache_info().currsize
    q, k, v = (torch.randn(1, 5, 1, 16) for _ in range(3))
    linear_attention(q, k, v, implementation="triton")
    assert triton_form._remembered.cache_info().currsize == before


WIDE = torch.zeros(1, 70, 4, 16, dtype=torch.bfloat16)
OTHERS = {
    "batch": {name: torch.zeros(2, 70, 2, 16, dtype=torch.bfloat16) for name in "qkv"},
    "length": {name: torch.zeros(1, 71, 2, 16, dtype=torch.bfloat16) for name in "qkv"},
    "dtype": {name: torch.zeros(1, 70, 2, 16) for name in "qkv"},
    "stride of q": {"q": WIDE[:, :, ::2]},
    "stride of k": {"k": WIDE[:, :, ::2]},
    "stride of v": {"v": WIDE[:, :, ::2]},
    "dtype of v": {"v": torch.zeros(1, 70, 2, 16)},
    "groups": {"q": WIDE},
    "value_dim": {"v": torch.zeros(1, 70, 2, 32, dtype=torch.bfloat16)},
    "no decay": {"log_decay": None},
    "dtype of decay": {"log_decay": torch.zeros(2, dtype=torch.bfloat16)},
    "gates": {"log_decay": torch.zeros(1, 70, 2)},
    "packed": {"cu_seqlens": torch.tensor([0, 70])},
    "two packed": {"cu_seqlens": torch.tensor([0, 30, 70])},
    "dtype of bounds": {"cu_seqlens": torch.tensor([0, 70], dtype=torch.int32)},
    "scale": {"scale": 0.5},
    "reverse": {"reverse": True},
    "backward": {"backward": True},
    "in parts": {"in_parts": True},
}


def test_calls_share_a_form_only_where_all_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from transnormer.ops.linear_attention.triton_form import form_of

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    forms = [form_of(**inputs(**changes)) for changes in ({}, *OTHERS.values())]
    assert len({id(made) for made in forms}) == 1 + len(OTHERS)
    assert form_of(**inputs()) is forms[0]
    assert form_of(**inputs(q=torch.ones(1, 70, 2, 16, dtype=torch.bfloat16))) is forms[0]


def strided(x: Tensor, draw: random.Random) -> Tensor:
    """Zeros of x's shape with strides of one kind or another."""
    batch, seq, heads, dim = x.shape
    return draw.choice([
        lambda: x,
        lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda: x.new_zeros(2 * batch, seq, heads, dim)[::2],
        lambda: x[:, :1].expand_as(x),
        lambda: x.new_zeros(batch, seq, heads, dim + 16)[..., :dim],
        lambda: x.new_zeros(batch, seq, 2 * heads, dim)[:, :, ::2],
    ])()  # fmt: skip


def any_call(draw: random.Random) -> None:
    """A call of one of some forms, with all that a form leaves open."""
    from transnormer.ops.linear_attention import triton_launch

    batch, kv_heads, key_dim, dtype = 1, 2, 16, torch.bfloat16
    seq, groups = draw.choice([1, 70, 4096]), draw.choice([1, 1, 2])
    value_dim = draw.choice([key_dim, key_dim, 32])

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def state() -> Tensor | None:
        made = zeros(sequences, kv_heads, key_dim, value_dim, dtype=torch.float32)
        return made if draw.random() < 0.5 else None

    heads = kv_heads * groups
    q, k = zeros(batch, seq, heads, key_dim), zeros(batch, seq, kv_heads, key_dim)
    v = zeros(batch, seq, kv_heads, value_dim)
    do = strided(
        zeros(batch, seq, heads, value_dim, dtype=draw.choice([dtype, torch.float32])), draw
    )
    gates = zeros(batch, seq, kv_heads, dtype=draw.choice([dtype, torch.float32]))
    log_decay = draw.choice([
        None, zeros(kv_heads, dtype=torch.float32), zeros(kv_heads), gates,
        zeros(batch, kv_heads, seq).mT,
    ])  # fmt: skip
    bounds, sequences = None, batch
    if draw.random() < 0.3:
        bounds, sequences = torch.tensor([0, draw.randint(0, seq), seq]), 2
    form = bounds, 0.5, draw.random() < 0.5
    wanted = draw.random() < 0.5, draw.random() < 0.5
    kind = draw.choice(["forward", "backward", "into", "part"])
    if kind == "forward":
        triton_launch.forward(q, k, v, log_decay, state(), *form)
    elif kind == "backward":
        triton_launch.backward(do, state(), q, k, v, log_decay, state(), *form, *wanted)
    elif kind == "into" and groups == 1 and key_dim == value_dim:
        joint = zeros(batch, seq, draw.choice([3, 4]) * heads * key_dim)
        parts = joint.unflatten(-1, (-1, key_dim)).split(heads, 2)
        into = parts[0], parts[1], parts[2]
        triton_launch.backward(
            do, None, q, k, v, log_decay, None, *form, False, False, into=into
        )  # fmt: skip
    elif kind == "part" and bounds is None and groups == 1:
        _, _, states = triton_launch.forward_and_states(
            q, k, v, log_decay, None, *form, exchange=torch.zeros_like
        )  # fmt: skip
        triton_launch.backward(
            do, None, q, k, v, log_decay, None, *form, *wanted, states=states,
            exchange=torch.zeros_like,
        )  # fmt: skip


def test_launches_that_share_a_kernel_differ_in_tensors_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transnormer.ops.linear_attention import triton_form, triton_units

    known: dict[Any, Any] = {}
    repeated: Counter[str] = Counter()

    class Form(triton_form.Form):
        def __init__(self, key: Any) -> None:
            super().__init__(key)
            self.key = key

        def launch(self, variant: Any, tensors: Any, rest: Any) -> None:
            kernel, programs, numbers, constants = rest()
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            assert set(names) <= set(constants)
            typed = [(type(x), x) for x in numbers]
            dtypes = [None if x is None else x.dtype for x in tensors]
            made = programs, typed, constants, dtypes
            repeated[kernel.fn.__name__] += (self.key, variant) in known
            assert known.setdefault((self.key, variant), made) == made

    monkeypatch.setattr(triton_form, "Form", Form)
    monkeypatch.setattr(triton_units, "launch", lambda *_, **__: None)
    draw = random.Random(0)
    for _ in range(20_000):
        any_call(draw)
    kernels = "forward", "backward", "local_state", "carry", "gate_sums", "decay_gradient"
    assert set(repeated) == {f"{name}_kernel" for name in kernels}
    assert min(repeated.values()) > 100, repeated
