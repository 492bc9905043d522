"""Softmax attention against its formula; no mask where none is needed; packed rows; caches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import SPLIT_FLOAT64, assert_close
from torch import Tensor

from transnormer.nn import softmax_attention
from transnormer.nn.softmax_attention import attention, packed_attention
from transnormer.nn.state import KVState
from transnormer.nn.token_mixers import Softmax, SoftmaxConfig

DIM, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8


def build(causal: bool = True, dtype: torch.dtype = torch.float64, **changes: Any) -> Softmax:
    fields = {"heads": HEADS, "kv_heads": KV_HEADS} | changes
    mixer = SoftmaxConfig(**fields).build(DIM, 0, 1, causal=causal)
    return mixer.to(dtype)


def run(mixer: Softmax, x: Tensor, **options: Any) -> tuple[Tensor, KVState | None]:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return mixer(x, **({"positions": positions} | options))


def qkv(batch: int, seq: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, seq, HEADS, HEAD_DIM, dtype=dtype),
        torch.randn(batch, seq, KV_HEADS, HEAD_DIM, dtype=dtype),
        torch.randn(batch, seq, KV_HEADS, HEAD_DIM + 4, dtype=dtype),
    )


def oracle(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The definition, head by head: weights exp(q k / sqrt(d)) over what is visible, [b, t, s]."""
    outputs = []
    for head in range(q.shape[2]):
        group = head * k.shape[2] // q.shape[2]
        scores = torch.einsum("btk,bsk->bts", q[:, :, head], k[:, :, group]) / q.shape[3] ** 0.5
        weights = scores.exp() * visible
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v[:, :, group])
    return torch.stack(outputs, 2)


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every call of the attention kernel."""
    calls = []
    real = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append({"shape": list(q.shape), **options})
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-way"])
def test_attention_is_its_definition(causal: bool) -> None:
    q, k, v = qkv(2, 20)
    visible = torch.ones(20, 20, dtype=torch.bool)
    o, state = attention(q, k, v, causal=causal)
    assert_close(o, oracle(q, k, v, visible.tril() if causal else visible))
    assert state.keys is k
    assert bool(state.valid.all())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-way"])
def test_attention_with_pads_and_a_past_is_its_definition(causal: bool) -> None:
    q, k, v = qkv(2, 9)
    _, old_k, old_v = qkv(2, 6)
    past = KVState(old_k, old_v, torch.rand(2, 6) < 0.6)
    mask = torch.rand(2, 9) < 0.7
    visible = torch.cat([past.valid, mask], 1)[:, None].expand(2, 9, 15).clone()
    if causal:
        visible &= torch.ones(9, 15, dtype=torch.bool).tril(6)
    visible[:, :, 6:] |= torch.eye(9, dtype=torch.bool)
    o, state = attention(q, k, v, causal=causal, mask=mask, past=past)
    exact = oracle(q, torch.cat([old_k, k], 1), torch.cat([old_v, v], 1), visible)
    assert_close(o[mask], exact[mask])
    assert torch.equal(state.valid, torch.cat([past.valid, mask], 1))


def test_the_mixer_is_projections_rotation_and_attention() -> None:
    mixer = build(bias=True)
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    torch.nn.init.normal_(mixer.q_proj.bias)
    q, k, v = (
        (x @ p.weight.T + p.bias).view(2, 20, -1, HEAD_DIM)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    theta = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.exp(1j * (torch.arange(7, 27)[:, None] * theta))[:, None]
    turned = [torch.complex(*part.chunk(2, -1)) * turn for part in (q, k)]
    q, k = (torch.cat([part.real, part.imag], -1) for part in turned)
    exact = oracle(q, k, v, torch.ones(20, 20).tril()).flatten(2)
    y, state = run(mixer, x, positions=torch.arange(7, 27).expand(2, -1))
    assert_close(y, exact @ mixer.out_proj.weight.T + mixer.out_proj.bias)
    assert_close(state.keys, k)


def test_sizes_of_heads() -> None:
    mixer = build(head_dim=12, kv_heads=None, rope_base=None)
    assert mixer.q_proj.weight.shape == mixer.k_proj.weight.shape == (48, DIM)
    assert mixer.out_proj.weight.shape == (DIM, 48)
    assert mixer.rotary is None
    with pytest.raises(ValueError, match="kv_heads is 3"):
        build(kv_heads=3)
    with pytest.raises(ValueError, match="heads is 5"):
        build(heads=5, kv_heads=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_rows_need_no_mask(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    calls = watch_calls(monkeypatch)
    attention(*qkv(2, 50, dtype), causal=True)
    (call,) = calls
    assert call["is_causal"] is True
    assert call["attn_mask"] is None
    # Flash attention reads grouped heads in place, and takes half precision alone.
    assert call["enable_gqa"] is (dtype == torch.bfloat16)


LENGTHS = [5, 1, 0, 70, 33, 64, 2, 0]


def packed_bounds() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def test_packed_documents_need_no_mask_and_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch)
    lengths = [3000, *[3] * 300, *[40] * 20]
    total = sum(lengths)
    q, k, v = (x[..., :4] for x in qkv(1, total, torch.float32))
    packed_attention(q, k, v, torch.tensor([0, *lengths]).cumsum(0), causal=True, keep_state=False)
    assert len(calls) == 3
    assert all(call["attn_mask"] is None and call["is_causal"] for call in calls)
    assert sum(call["shape"][0] * call["shape"][2] for call in calls) <= 2 * total


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "pads"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-way"])
def test_packed_is_separate_with_gradients(causal: bool, masked: bool) -> None:
    bounds, total = packed_bounds(), sum(LENGTHS)
    inputs = [x.requires_grad_() for x in qkv(1, total)]
    mask = (torch.rand(1, total) < 0.7) if masked else None
    real = torch.ones(1, total, dtype=torch.bool) if mask is None else mask
    weights = (
        torch.randn(1, total, HEADS, HEAD_DIM + 4, dtype=torch.float64) * real[..., None, None]
    )
    o, _ = packed_attention(*inputs, bounds, causal=causal, mask=mask)
    actual = torch.autograd.grad((o * weights).sum(), inputs)
    parts = []
    for start, stop in zip(bounds.tolist(), bounds[1:].tolist()):
        if stop > start:
            row_mask = None if mask is None else mask[:, start:stop]
            row = (x[:, start:stop] for x in inputs)
            parts.append(attention(*row, causal=causal, mask=row_mask)[0])
    exact = torch.cat(parts, 1)
    assert_close(o[real], exact[real], limit=SPLIT_FLOAT64)
    for x, y in zip(actual, torch.autograd.grad((exact * weights).sum(), inputs)):
        assert_close(x, y, limit=SPLIT_FLOAT64)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "pads"])
def test_packed_in_one_graph_is_packed_in_rows(masked: bool) -> None:
    bounds, total = packed_bounds(), sum(LENGTHS)
    mask = (torch.rand(1, total) < 0.7) if masked else None
    one_graph = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    past = None
    for _ in range(2):
        inputs = qkv(1, total)
        options = {"causal": True, "mask": mask, "past": past}
        o, state = one_graph(*inputs, bounds, **options)
        exact, past = packed_attention(*inputs, bounds, **options)
        real = slice(None) if mask is None else mask
        assert_close(o[real], exact[real], limit=SPLIT_FLOAT64)
        for row in range(len(LENGTHS)):
            for mine, other in zip(state[:2], past[:2]):
                assert torch.equal(mine[row][state.valid[row]], other[row][past.valid[row]])


def test_masks_of_long_chunks_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, 30)
    past = attention(*qkv(2, 11), causal=True)[1]
    exact, _ = attention(q, k, v, causal=True, past=past)
    monkeypatch.setattr(softmax_attention, "_MASK_ENTRIES", 2 * 41 * 7)
    calls = watch_calls(monkeypatch)
    o, _ = attention(q, k, v, causal=True, past=past)
    assert_close(o, exact, limit=SPLIT_FLOAT64)
    assert [call["shape"][2] for call in calls] == [7, 7, 7, 7, 2]
    assert max(call["attn_mask"].numel() for call in calls) <= 2 * 41 * 7


def test_a_step_reads_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, past = attention(*qkv(2, 11), causal=True)
    calls = watch_calls(monkeypatch)
    attention(*qkv(2, 1), causal=True, past=past)
    assert calls[0]["shape"] == [2, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM]


@pytest.mark.parametrize("seq", [1, 9])
def test_rows_of_pads_alone_give_finite_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, seq: int
) -> None:
    calls = watch_calls(monkeypatch)
    mixer = build()
    x = torch.randn(2, seq, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True], [False]]).expand(2, seq)
    y, state = run(mixer, x, mask=mask)
    y.square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(x.grad).all())
    # Kernels differ in what they make of a query that sees nothing: none is asked.
    assert bool(calls[0]["attn_mask"].any(-1).all())
    assert state.valid.sum(1).tolist() == [seq, 0]
    # The hidden slots hold nothing of the pads.
    assert not state.keys[1].any()
    assert not state.values[1].any()


def test_hidden_slots_of_packed_states_hold_nothing() -> None:
    q, k, v = qkv(1, 9)
    _, state = packed_attention(q, k, v, torch.tensor([0, 2, 2, 9]), causal=True)
    assert state.valid.sum(1).tolist() == [2, 0, 7]
    assert not state.keys[~state.valid].any()
    assert torch.equal(state.values[2], v[0, 2:])


def test_the_cache_has_the_dtype_of_the_activations() -> None:
    mixer = build(dtype=torch.float32)
    x = torch.randn(2, 6, DIM)
    assert run(mixer, x)[1].keys.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = run(mixer, x, state=mixer.empty_state(2))
    assert state.keys.dtype == state.values.dtype == torch.bfloat16
    empty = mixer.empty_state(3, dtype=torch.float16, device="meta")
    assert empty.keys.dtype == torch.float16
    assert empty.keys.shape == (3, 0, KV_HEADS, HEAD_DIM)


def test_a_two_way_mixer_keeps_no_state() -> None:
    mixer = build(causal=False)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    assert run(mixer, x)[1] is None
    assert run(mixer, x, cu_seqlens=torch.tensor([0, 2, 6]))[1] is None
