"""The engine on a GPU: graphs of steps, the kernels in slots, and the same tokens as alone."""

from pathlib import Path

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model
from engine_cases import GREEDY, assert_all_alone, engine_of, prompts_of
from kernel_cases import no_synchronisation
from nn.mixer_cases import CASES, MixerCase
from tolerances import BF16_MODEL, QUANTIZED_LOGITS, SPLIT_GPU, relative_error

from transnormer.infer import fused
from transnormer.infer.pool import FixedPool, make_pool
from transnormer.infer.quantize import quantize
from transnormer.infer.sampling import SamplingConfig, TokenHistory, draw
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder

pytestmark = pytest.mark.gpu
MODES = {
    "plain": {},
    "ring": {"ring": 16},
    "drafts-ring": {"draft_tokens": 7, "ring": 16},
    "drafts": {"draft_tokens": 3},
    "compiled": {"compile": True},
    "compiled-ring": {"compile": True, "ring": 16},
    "fused": {"fused": True},
    "fused-ring": {"fused": True, "ring": 16},
    "fused-drafts-ring": {"fused": True, "draft_tokens": 7, "ring": 16},
}


# Compiled in float32, which the compiler would rather see rounded to TF32.
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_greedy_tokens_under_load_are_those_alone(mode: dict[str, object]) -> None:
    engine = engine_of(make_model().cuda(), slots=5, prefill_tokens=40, **mode)
    requests = [engine.submit(p, max_new_tokens=40, sampling=GREEDY) for p in prompts_of()]
    engine.run()
    assert_all_alone(make_model(), prompts_of(), requests)


def test_a_draw_does_not_wait_for_the_device() -> None:
    configs = [
        GREEDY,
        SamplingConfig(temperature=0.7),
        SamplingConfig(top_k=5, logit_bias=((4, 2.0),), repetition_penalty=1.3),
        SamplingConfig(top_p=0.9, min_p=0.01, presence_penalty=0.4),
    ]
    history = TokenHistory([1, 2])
    history.add(3)

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        rows = [history.adjust(row, own) for row, own in zip(logits, configs, strict=True)]
        return draw(torch.stack(rows), configs, torch.tensor([0.1, 0.4, 0.6, 0.9]).double())

    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    there = logits.cuda()
    with no_synchronisation():
        tokens = drawn(there)
    assert tokens.tolist() == drawn(logits).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_mixer_runs_from_its_slots(case: MixerCase) -> None:
    prompts = [prompt % VOCAB % 29 for prompt in prompts_of((6, 1, 13, 9))]
    engine = engine_of(case.model().cuda(), slots=2)
    requests = [engine.submit(p, max_new_tokens=8, sampling=GREEDY) for p in prompts]
    engine.run()
    assert_all_alone(case.model(), prompts, requests)


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("ring", [None, 16])
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_steps_have_the_logits_of_the_model(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, overlap: bool, ring: int | None, rows: int
) -> None:
    """Twenty steps in graphs, so that a kernel that begins too early meets what is not yet there."""
    monkeypatch.setattr(fused, "OVERLAP", overlap)
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=512, model_dim=512, num_layers=4, heads=4, glu_dim=1408)
    model = Decoder(config.model_copy(update={"init_std": 0.05})).to("cuda", dtype).eval()
    pools = [make_pool(model, rows, fused=is_fused, ring=ring) for is_fused in (False, True)]
    limit = BF16_MODEL if dtype == torch.bfloat16 else SPLIT_GPU
    for step in range(20):
        ids = torch.randint(512, (rows, 1), generator=torch.Generator().manual_seed(step))
        plain, made = (pool.decode(ids, range(rows), rows).clone() for pool in pools)
        assert relative_error(made, plain) <= limit
        if dtype == torch.float32:
            assert pools[1].likeliest[0, :, 0].tolist() == made[:, 0].argmax(-1).tolist()
    states = [pool.read(range(rows)) for pool in pools]
    assert states[0].positions.tolist() == states[1].positions.tolist() == [20] * rows
    for plain, made in zip(states[0].layers, states[1].layers, strict=True):
        assert relative_error(made, plain) <= limit


@pytest.mark.parametrize("mode", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("ring", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_batch_invariant_mode_gives_the_same_bits(
    dtype: torch.dtype, ring: int | None, mode: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=512, model_dim=512, num_layers=4, heads=4, glu_dim=1408)
    model = Decoder(config).to("cuda", dtype).eval()
    prompts = prompts_of((5, 1, 90, 33, 17))

    def run(chosen: list[int]) -> list[object]:
        options = {"slots": 4, "prefill_tokens": 64, "batch_invariant": True, "ring": ring}
        engine = engine_of(model, **options, **mode)
        requests = [
            engine.submit(prompts[i], max_new_tokens=40, sampling=GREEDY, logprobs=512)
            for i in chosen
        ]
        engine.run()
        return [request.logprobs for request in requests]

    together = run([0, 1, 2, 3, 4])
    assert [run([i])[0] for i in (0, 2, 4)] == [together[i] for i in (0, 2, 4)]
    assert run([4, 1]) == [together[4], together[1]]


def test_a_graph_serves_every_length_and_a_row_that_is_not_real_changes_nothing() -> None:
    engine = engine_of(make_model().cuda(), slots=4)
    pool = engine.pool
    assert isinstance(pool, FixedPool)
    for lengths in ((4, 30, 9), (50,), (7, 8)):
        requests = [
            engine.submit(p, max_new_tokens=9, sampling=GREEDY, keep_state=True)
            for p in prompts_of(lengths)
        ]
        engine.run()
        assert_all_alone(make_model(), prompts_of(lengths), requests)
        for length, request in zip(lengths, requests, strict=True):
            assert request.state.positions.tolist() == [length + 9]
    assert set(pool.step._graphs) <= {(1, 1), (2, 1), (4, 1)}
    assert int(pool.positions[4]) == 0


@pytest.mark.parametrize(
    ("bits", "calibrated"), [(8, False), (4, False), (4, True)], ids=["int8", "nearest", "gptq"]
)
def test_quantised_weights_are_those_of_the_cpu(bits: int, calibrated: bool) -> None:
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=2, heads=2, glu_dim=128)
    config = config.model_copy(update={"init_std": 0.1})
    ids, logits = make_ids(2, 30), {}
    for device in ("cpu", "cuda"):
        model = make_model(config, torch.bfloat16).to(device)
        texts = [make_ids(4, 60).to(device)] if calibrated else None
        quantize(model, bits, group_size=32, calibration=texts)
        logits[device] = model(ids.to(device)).logits.cpu()
    # Four bits to the nearest have another zero in the kernels' format.
    limit = QUANTIZED_LOGITS[4] if bits == 4 else 2 * BF16_MODEL
    assert relative_error(logits["cuda"], logits["cpu"]) <= limit


@pytest.mark.parametrize("bits", [8, 4])
def test_files_quantised_on_a_cpu_run_on_the_gpu(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=2, heads=2, glu_dim=128)
    model = make_model(config.model_copy(update={"init_std": 0.1}), torch.bfloat16)
    quantize(model, bits, group_size=32)
    checkpoint.save(model, tmp_path)
    ids, loaded = make_ids(2, 30), checkpoint.load(tmp_path, device="cuda")
    made = loaded(ids.cuda()).logits.cpu()
    assert relative_error(made, model(ids).logits) <= 2 * BF16_MODEL
    pool = make_pool(loaded, 1, fused=True)
    fused_logits = pool.decode(ids[:1, :1], [0], 1)[0].cpu()
    assert relative_error(fused_logits, model(ids[:1, :1]).logits[0]) <= 2 * BF16_MODEL
