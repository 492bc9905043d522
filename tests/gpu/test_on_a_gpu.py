"""The plain-PyTorch paths on a GPU: the op, the decoder, training and decoding at real sizes."""

from pathlib import Path

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, make_model
from tolerances import (
    GRADIENT,
    KERNEL_GATE_GRADIENT,
    KERNEL_GRADIENT,
    KERNEL_OUTPUT,
    KERNEL_STATE,
    SPLIT_GPU,
    assert_close,
)
from train_cases import tiny_run

from transnormer import DecoderState, generate
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder
from transnormer.ops import linear_attention, linear_attention_step, linear_cross_entropy
from transnormer.train import run_training

pytestmark = pytest.mark.gpu
GPU = "cuda"


def gate_shape(decay: str, seq: int, heads: int, dim: int) -> tuple[int, ...]:
    return {"constant": (heads,), "token": (1, seq, heads), "key": (1, seq, heads, dim)}[decay]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("decay", ["constant", "token", "key"])
def test_op_equals_float64_on_rounded_inputs(decay: str, dtype: torch.dtype) -> None:
    seq, heads, dim = 3000, 4, 64
    cu_seqlens = torch.tensor([0, 1, 1, 1500, seq], dtype=torch.int32)
    q, k, v = (torch.randn(1, seq, heads, dim).to(dtype) for _ in range(3))
    log_decay = -torch.rand(gate_shape(decay, seq, heads, dim)).square()
    state = torch.randn(4, heads, dim, dim)
    results = []
    for device, wanted in ((GPU, dtype), ("cpu", torch.float64)):
        state_dtype = torch.float64 if wanted == torch.float64 else torch.float32
        leaves = [x.to(device, wanted).requires_grad_() for x in (q, k, v)]
        leaves += [x.to(device, state_dtype).requires_grad_() for x in (log_decay, state)]
        o, final_state = linear_attention(
            *leaves[:4], initial_state=leaves[4], cu_seqlens=cu_seqlens.to(device)
        )
        grads = torch.autograd.grad(o.sum() + final_state.sum(), leaves)
        results.append([x.detach().cpu() for x in (o, final_state, *grads)])
    actual, exact = results
    # The kernels, which "auto" takes, round states inside products, and gates' decayed tokens.
    gradient = (KERNEL_GRADIENT if decay == "constant" else KERNEL_GATE_GRADIENT)[dtype]
    assert_close(actual[0], exact[0], limit=KERNEL_OUTPUT[dtype], name="o")
    assert_close(actual[1], exact[1], limit=KERNEL_STATE[dtype], name="final_state")
    for name, x, y in zip(("q", "k", "v"), actual[2:5], exact[2:5], strict=True):
        assert_close(x, y, limit=gradient, name=f"gradient of {name}")
    assert_close(actual[6], exact[6], limit=gradient, name="gradient of the state")


@pytest.mark.parametrize("decay", ["constant", "token", "key"])
def test_a_graph_of_the_op_replays(decay: str) -> None:
    seq, heads, dim = 300, 4, 32
    q, k, v = (torch.randn(1, seq, heads, dim, device=GPU) for _ in range(3))
    log_decay = -torch.rand(gate_shape(decay, seq, heads, dim)).to(GPU)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear_attention(q, k, v, log_decay)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = linear_attention(q, k, v, log_decay)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(o, linear_attention(q, k, v, log_decay)[0])


def test_a_graph_of_a_step_with_slots_replays() -> None:
    q, pool = torch.randn(3, 4, 32, device=GPU), torch.randn(5, 4, 32, 32, device=GPU)
    log_decay, before = -torch.rand(4, device=GPU), pool.clone()
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device=GPU)
    linear_attention_step(q, q, q, log_decay, pool, slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = linear_attention_step(q, q, q, log_decay, pool, slots=slots)
    pool.copy_(before)
    graph.replay()
    exact, state = linear_attention_step(q[[0, 2]], q[[0, 2]], q[[0, 2]], log_decay, before[[4, 0]])
    assert torch.equal(o[[0, 2]], exact)
    assert torch.equal(pool[[4, 0]], state)
    assert torch.equal(pool[1:4], before[1:4])


def test_prefill_and_steps_agree_with_one_pass() -> None:
    model, ids = make_model().to(GPU), make_ids(2, 300).to(GPU)
    whole = model(ids).logits
    out = model(ids[:, :200])
    logits = [out.logits]
    for t in range(200, 300):
        out = model(ids[:, t : t + 1], state=out.state)
        logits.append(out.logits)
    assert_logits_agree(torch.cat(logits, 1), whole, SPLIT_GPU)


def test_greedy_tokens_equal_those_of_a_cpu(tmp_path: Path) -> None:
    model, prompts = make_model(), [make_ids(1, 7)[0], make_ids(1, 3, seed=5)[0]]
    here = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    list(here)
    checkpoint.save(model, tmp_path / "model")
    moved = checkpoint.load(tmp_path / "model", device=GPU)
    there = generate(moved, [p.to(GPU) for p in prompts], max_new_tokens=20, temperature=0.0)
    list(there)
    assert here.token_ids == there.token_ids
    there.state.save(tmp_path / "state.safetensors", moved)
    loaded = DecoderState.load(tmp_path / "state.safetensors", moved)
    assert loaded.layers[0].device.type == GPU


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_loss_needs_an_eighth_of_the_full_logits(reduction: str) -> None:
    vocab_size, tokens = 64_000, 8192
    config = zoo.tnl_custom(vocab_size=vocab_size, model_dim=64, num_layers=1, heads=1, glu_dim=64)
    model = Decoder(config).to(GPU, torch.bfloat16)
    x = torch.randn(tokens, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab_size, (tokens,), device=GPU)
    weight = model.head_weight
    weight.grad, x.grad = torch.zeros_like(weight), torch.zeros_like(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels, reduction=reduction).sum().backward()
    # The gradient of the head is summed in float32 before it is rounded; it is no logit. That of a
    # sum is multiplied once more.
    bytes_of_sums = 6 if reduction == "none" else 10
    extra = torch.cuda.max_memory_allocated() - before - bytes_of_sums * weight.numel()
    assert extra <= vocab_size * tokens * 4 // 8


@pytest.mark.parametrize("vocab_size", [64_000, 32_769], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_of_losses_by_kernels(dtype: torch.dtype, vocab_size: int) -> None:
    tokens, dim = 3_000, 256
    x = torch.randn(tokens, dim, device=GPU).to(dtype).requires_grad_()
    weight = (0.2 * torch.randn(vocab_size, dim, device=GPU)).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), device=GPU)
    labels[::7] = -100
    junk = [torch.full((1 << 24,), float("nan"), device=GPU) for _ in range(4)]
    del junk
    total = linear_cross_entropy(x, weight, labels, reduction="sum", implementation="triton")
    (total / tokens).backward()
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    wanted = linear_cross_entropy(*exact, labels, reduction="sum", implementation="tiled")
    (wanted / tokens).backward()
    assert_close(total, wanted, limit=GRADIENT[dtype], name="loss")
    for name, mine, other in zip(("x", "weight"), (x, weight), exact, strict=True):
        assert_close(mine.grad, other.grad, limit=GRADIENT[dtype], name=name)


def test_training_runs_and_resumes_in_bfloat16(tmp_path: Path) -> None:
    precise = ("train.device=cuda", "train.precision=bfloat16", "train.save_every=3")
    run_training(tiny_run(tmp_path, *precise, "train.steps=3"))
    done = run_training(tiny_run(tmp_path, *precise, "train.steps=6"), resume=True)
    assert done.step == 6
    assert checkpoint.load(done.run_dir, device=GPU).embedding.weight.is_cuda
