"""Decoding steps on a CPU: the model's logits, states and tokens; refusals name the part."""

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model, tnl_config, variant_config
from engine_cases import GREEDY, assert_all_alone, engine_of, prompts_of
from tolerances import BF16_MODEL, DECODER_FLOAT32, relative_error
from torch import Tensor

from transnormer.infer import cpu_step, pool
from transnormer.infer.cpu_step import CpuStep
from transnormer.infer.fused import FusedStep
from transnormer.infer.quantize import quantize
from transnormer.infer.reading import evaluate
from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.norms import NormConfig
from transnormer.ops import RingState, decode

# Rows and tokens, the activations' dtype, entries of a ring.
CASES = [
    pytest.param(shape, dtype, ring, id=f"{shape[0]}x{shape[1]}-{dtype}-{ring}")
    for shape, dtype, ring in [
        ((1, 1), torch.float32, None),
        ((1, 1), torch.bfloat16, None),
        ((1, 1), torch.float32, 16),
        ((3, 1), torch.float32, None),
        ((3, 1), torch.bfloat16, None),
        ((3, 2), torch.float32, None),
        ((2, 2), torch.bfloat16, 16),
    ]
]
# Switches of the layers beside those of the released models.
VARIANTS = {
    "turned": {"lrpe": "all"},
    "activated": {
        "mixer": {
            "decay": "none",
            "qk_activation": "relu",
            "v_activation": "silu",
            "gate_activation": "sigmoid",
            "bias": True,
        },
        "glu": {"activation": "gelu", "bias": True},
        "lrpe": "none",
        "embedding_scale": False,
        "tie_embeddings": False,
    },
    "norms": {"norm": NormConfig(kind="rms", eps=0.5), "final_norm": NormConfig(eps=0.25)},
}


def start_of(model: Decoder) -> DecoderState:
    """Five sequences at positions far apart."""
    state = model(make_ids(5, 7)).state
    assert state is not None
    return state.detach()._replace(positions=state.positions + torch.arange(5) * 999_983)


def assert_step_agrees(
    model: Decoder, ids: Tensor, used: list[int], limit: float, ring: int | None = None
) -> None:
    """Fail unless a step's logits and states are the model's, and other slots stay."""
    before, state = start_of(model), start_of(model).clone()
    dtype = model.embedding.weight.dtype
    layers = [
        x
        if ring is None or not isinstance(x, Tensor)
        else RingState.from_state(x, capacity=ring, dtype=dtype)
        for x in state.layers
    ]
    slots = torch.tensor([*used, -1], dtype=torch.int32)
    padded = torch.cat([ids, ids[:1]])
    logits = CpuStep(model)(padded, slots, state.positions, layers)[: len(used)]
    expected = evaluate(model, ids, state=before.select(used))
    assert expected.state is not None
    assert logits.dtype == expected.logits.dtype
    assert relative_error(logits, expected.logits) <= limit
    others = [slot for slot in range(5) if slot not in used]
    assert state.positions[used].tolist() == expected.state.positions.tolist()
    assert torch.equal(state.positions[others], before.positions[others])
    for layer, new, old in zip(layers, expected.state.layers, before.layers, strict=True):
        if isinstance(layer, Tensor):
            assert relative_error(layer[used], new) <= limit
            assert torch.equal(layer[others], old[others])


@pytest.mark.parametrize(("shape", "dtype", "ring"), CASES)
def test_a_step_is_the_models(shape: tuple[int, int], dtype: torch.dtype, ring: int | None) -> None:
    limit = DECODER_FLOAT32 if dtype == torch.float32 else BF16_MODEL
    model, used = make_model(dtype=dtype), [4, 0, 2][: shape[0]]
    assert_step_agrees(model, make_ids(*shape), used, limit, ring)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_step_has_the_switches_of_the_layers(variant: dict[str, object]) -> None:
    model = make_model(variant_config(**variant))
    assert_step_agrees(model, make_ids(2, 1), [3, 1], DECODER_FLOAT32)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_read_by_their_modules(bits: int) -> None:
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=2, heads=2, glu_dim=128)
    model = make_model(config.model_copy(update={"init_std": 0.1}))
    quantize(model, bits, group_size=32)
    assert_step_agrees(model, make_ids(1, 1), [3], DECODER_FLOAT32)


class Doubled(torch.nn.Linear):
    """A projection that someone adapted."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def test_projections_that_were_adapted_are_left_to_their_modules() -> None:
    model = make_model()
    model.blocks[1].token_mixer.out_proj.__class__ = Doubled
    assert_step_agrees(model, make_ids(2, 1), [3, 1], DECODER_FLOAT32)


def test_more_rows_than_are_few_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "ROWS", 2)
    monkeypatch.setattr(cpu_step.few_rows, "product", None)
    assert_step_agrees(make_model(), make_ids(3, 1), [4, 0, 2], DECODER_FLOAT32)


@pytest.mark.parametrize("mode", [{}, {"draft_tokens": 3, "ring": 16}], ids=str)
def test_tokens_of_a_fused_engine_on_a_cpu_are_those_alone(
    monkeypatch: pytest.MonkeyPatch, mode: dict[str, object]
) -> None:
    # Where Triton's interpreter runs, the kernels stand in for the step.
    monkeypatch.setattr(decode, "why_not", lambda device: "inputs are on cpu")
    model, prompts = make_model(), prompts_of((5, 1))
    engine = engine_of(model, fused=True, slots=2, **mode)
    assert isinstance(engine.pool._fused, CpuStep)
    requests = [engine.submit(p, max_new_tokens=6, sampling=GREEDY) for p in prompts]
    engine.run()
    assert_all_alone(model, prompts, requests)


def test_kernels_stand_in_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.decode, "why_not", lambda device: None)
    assert isinstance(pool._fused_step(make_model()), FusedStep)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: zoo.get("small-retnet"), r"blocks\[0\].token_mixer is a Retention"),
        (lambda: variant_config({"gate": "low_rank"}), r"token_mixer.gate is 'low_rank'"),
        (lambda: tnl_config(max_positions=9), "max_positions is 9; expected 0"),
    ],
)
def test_a_part_that_the_step_does_not_have_is_named(config: object, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        CpuStep(make_model(config()))
