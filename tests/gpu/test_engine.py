"""The engine on a GPU: graphs of steps, the kernels in slots, and the same tokens as alone."""

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model
from engine_cases import GREEDY, assert_all_alone, engine_of, prompts_of
from nn.mixer_cases import CASES, MixerCase
from tolerances import BF16_MODEL, QUANTIZED_LOGITS, relative_error

from transnormer.infer.pool import FixedPool
from transnormer.infer.quantize import quantize
from transnormer.models import zoo
from transnormer.models.decoder import Decoder

pytestmark = pytest.mark.gpu
MODES = {
    "plain": {},
    "ring": {"ring": 16},
    "drafts-ring": {"draft_tokens": 7, "ring": 16},
    "drafts": {"draft_tokens": 3},
    "compiled": {"compile": True},
    "compiled-ring": {"compile": True, "ring": 16},
}


# Compiled in float32, which the compiler would rather see rounded to TF32.
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_greedy_tokens_under_load_are_those_alone(mode: dict[str, object]) -> None:
    engine = engine_of(make_model().cuda(), slots=5, prefill_tokens=40, **mode)
    requests = [engine.submit(p, max_new_tokens=40, sampling=GREEDY) for p in prompts_of()]
    engine.run()
    assert_all_alone(make_model(), prompts_of(), requests)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_mixer_runs_from_its_slots(case: MixerCase) -> None:
    prompts = [prompt % VOCAB % 29 for prompt in prompts_of((6, 1, 13, 9))]
    engine = engine_of(case.model().cuda(), slots=2)
    requests = [engine.submit(p, max_new_tokens=8, sampling=GREEDY) for p in prompts]
    engine.run()
    assert_all_alone(case.model(), prompts, requests)


@pytest.mark.parametrize("ring", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_batch_invariant_mode_gives_the_same_bits(dtype: torch.dtype, ring: int | None) -> None:
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=512, model_dim=512, num_layers=4, heads=4, glu_dim=1408)
    model = Decoder(config).to("cuda", dtype).eval()
    prompts = prompts_of((5, 1, 90, 33, 17))

    def run(chosen: list[int]) -> list[object]:
        engine = engine_of(model, slots=4, prefill_tokens=64, batch_invariant=True, ring=ring)
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
    assert set(pool._step._graphs) <= {(1, 1), (2, 1), (4, 1)}
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
