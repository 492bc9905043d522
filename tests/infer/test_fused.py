"""Fused decoding steps: the model's logits, states and tokens, and refusals that name the part."""

import copy
import dataclasses

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model, tnl_config, variant_config
from engine_cases import GREEDY, assert_all_alone, engine_of, prompts_of
from kernel_cases import needs_interpreter
from tolerances import BF16_MODEL, DECODER_FLOAT32, relative_error
from torch import Tensor

from transnormer.infer import fused, pool, slots
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.fused import FusedStep
from transnormer.infer.pool import make_pool
from transnormer.infer.quantize import quantize
from transnormer.infer.reading import evaluate
from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.norms import NormConfig
from transnormer.nn.state import LayerState
from transnormer.ops import RingState, decode
from transnormer.ops.decode.tiles import RowTile

# Rows and tokens, the activations' dtype, entries of a ring.
CASES = [
    pytest.param(shape, dtype, ring, id=f"{shape[0]}x{shape[1]}-{name}-{ring}")
    for shape, dtype, name, ring in [
        ((1, 1), torch.float32, "fp32", None),
        ((1, 1), torch.bfloat16, "bf16", None),
        ((1, 1), torch.float32, "fp32", 16),
        ((3, 1), torch.float32, "fp32", None),
        ((3, 1), torch.bfloat16, "bf16", None),
        ((1, 3), torch.float32, "fp32", None),
        ((3, 1), torch.float32, "fp32", 16),
        ((3, 1), torch.bfloat16, "bf16", 16),
        ((3, 2), torch.float32, "fp32", 16),
        ((2, 2), torch.bfloat16, "bf16", 16),
    ]
]
# Switches of the layers beside those of the released models.
VARIANTS = {
    "released": {},
    "turned": {"lrpe": "all"},
    "activated": {
        "mixer": {
            "decay": "none",
            "qk_activation": "relu",
            "v_activation": "silu",
            "gate_activation": "sigmoid",
        },
        "glu": {"activation": "silu"},
        "lrpe": "none",
        "embedding_scale": False,
        "tie_embeddings": False,
    },
    "eps": {"norm": NormConfig(eps=0.5), "final_norm": NormConfig(eps=0.25)},
}


@dataclasses.dataclass
class Outcome:
    """What a step gave: logits, and the states and positions of every slot."""

    logits: Tensor
    layers: list[LayerState]
    positions: Tensor


def start_of(model: Decoder) -> DecoderState:
    """Five sequences at positions far apart."""
    state = model(make_ids(5, 7)).state
    assert state is not None
    return state.detach()._replace(positions=state.positions + torch.arange(5) * 999_983)


def fused_step(model: Decoder, ids: Tensor, used: list[int], ring: int | None = None) -> Outcome:
    """One step from ``start_of`` by the kernels."""
    state = start_of(model).clone()
    layers: list[LayerState] = [
        x if ring is None else RingState.from_state(x, capacity=ring, dtype=ids_dtype(model))
        for x in state.layers
    ]
    slots = torch.tensor(used, dtype=torch.int32)
    logits = FusedStep(model)(ids, slots, state.positions, layers)
    return Outcome(logits, layers, state.positions)


def ids_dtype(model: Decoder) -> torch.dtype:
    """The activations' dtype."""
    return model.embedding.weight.dtype


def model_step(model: Decoder, ids: Tensor, used: list[int], *, exact: bool = False) -> Outcome:
    """The same by the model, or from the same state with its weights in float32."""
    state = start_of(model).select(used)
    output = evaluate(copy.deepcopy(model).float() if exact else model, ids, state=state)
    assert output.state is not None
    return Outcome(output.logits, list(output.state.layers), output.state.positions)


def assert_step_agrees(
    model: Decoder, ids: Tensor, used: list[int], ring: int | None = None
) -> Outcome:
    """Fail unless logits and states are the model's in float32, and positions go on."""
    made = fused_step(model, ids, used, ring)
    exact = model_step(model, ids, used, exact=True)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    limit = DECODER_FLOAT32 if ids_dtype(model) == torch.float32 else BF16_MODEL
    assert relative_error(made.logits, exact.logits) <= limit
    for layer, new in zip(made.layers, exact.layers, strict=True):
        if isinstance(layer, Tensor):
            assert relative_error(layer[used], new) <= limit
    assert made.positions[used].tolist() == exact.positions.tolist()
    return made


@needs_interpreter
@pytest.mark.parametrize(("shape", "dtype", "ring"), CASES)
def test_a_step_is_the_models(shape: tuple[int, int], dtype: torch.dtype, ring: int | None) -> None:
    model, ids, used = make_model(dtype=dtype), make_ids(*shape), [4, 0, 2][: shape[0]]
    made = assert_step_agrees(model, ids, used, ring)
    others = [slot for slot in range(5) if slot not in used]
    before = start_of(model)
    assert torch.equal(made.positions[others], before.positions[others])
    for layer, old in zip(made.layers, before.layers, strict=True):
        if isinstance(layer, Tensor):
            assert torch.equal(layer[others], old[others])


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_step_has_the_switches_of_the_layers(variant: dict[str, object], rows: int) -> None:
    model, ids, used = make_model(variant_config(**variant)), make_ids(rows, 1), [3, 1][:rows]
    assert_step_agrees(model, ids, used)


@needs_interpreter
def test_more_rows_than_kernels_multiply_are_left_to_the_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "ROWS", 2)
    model, ids, used = make_model(dtype=torch.bfloat16), make_ids(3, 1), [4, 0, 2]
    step, exact = FusedStep(model), model_step(model, ids, used)
    monkeypatch.setattr(step._projection, "project_rows", None)
    state, slots = start_of(model).clone(), torch.tensor(used, dtype=torch.int32)
    logits = step(ids, slots, state.positions, list(state.layers))
    assert relative_error(logits, exact.logits) <= BF16_MODEL


@needs_interpreter
def test_ids_and_slots_may_lie_anyhow() -> None:
    model, ids = make_model(), make_ids(2, 3)
    state, slots = start_of(model).clone(), torch.tensor([4, 1, 2, 1], dtype=torch.int32)[::2]
    logits = FusedStep(model)(ids.T.contiguous().T, slots, state.positions, list(state.layers))
    exact = model_step(model, ids, [4, 2])
    assert relative_error(logits, exact.logits) <= DECODER_FLOAT32


class Doubled(torch.nn.Linear):
    """A projection that someone adapted."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@needs_interpreter
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.bfloat16)], ids=str)
def test_projections_that_were_adapted_are_left_to_their_modules(
    rows: int, dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    model.blocks[1].token_mixer.out_proj.__class__ = Doubled
    assert_step_agrees(model, make_ids(rows, 1), [3, 1][:rows])


@needs_interpreter
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_row_that_is_not_real_changes_nothing(tokens: int) -> None:
    model = make_model()
    before, made = start_of(model), fused_step(model, make_ids(2, tokens), [-1, -1])
    assert torch.equal(made.positions, before.positions)
    for layer, old in zip(made.layers, before.layers, strict=True):
        assert torch.equal(layer, old)


@needs_interpreter
@pytest.mark.parametrize("mode", [{}, {"draft_tokens": 3, "ring": 16}], ids=str)
def test_tokens_of_a_fused_engine_are_those_alone(mode: dict[str, object]) -> None:
    model, prompts = make_model(), prompts_of((5, 1))
    engine = engine_of(model, fused=True, slots=2, **mode)
    requests = [engine.submit(p, max_new_tokens=3, sampling=GREEDY) for p in prompts]
    engine.run()
    assert_all_alone(model, prompts, requests)


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_read_as_they_are(bits: int, rows: int) -> None:
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=1, heads=2, glu_dim=128)
    model = make_model(config.model_copy(update={"init_std": 0.1}))
    quantize(model, bits, group_size=32)
    # Single rows: kernels read eight bits, and four bits whose scales are bfloat16.
    assert (FusedStep(model)._matrices is None) == (bits == 4)
    assert_step_agrees(model, make_ids(rows, 1), [3, 1][:rows])


@needs_interpreter
def test_factors_that_lie_in_different_forms_are_left_to_their_modules() -> None:
    """A GLU's two products are one kernel's."""
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=1, heads=2, glu_dim=128)
    model = make_model(config.model_copy(update={"init_std": 0.1}))
    plain = copy.deepcopy(model.blocks[0].channel_mixer.up_proj)
    quantize(model, 8)
    model.blocks[0].channel_mixer.up_proj = plain
    assert_step_agrees(model, make_ids(1, 1), [3])


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2])
def test_four_bits_of_a_bfloat16_model_are_read_by_kernels(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    pytest.importorskip("torchao")
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=1, heads=2, glu_dim=128)
    model = make_model(config.model_copy(update={"init_std": 0.1}), torch.bfloat16)
    quantize(model, 4, group_size=32)
    ids, used = make_ids(rows, 1), [3, 1][:rows]
    exact, state = model_step(model, ids, used), start_of(model).clone()
    step, slots = FusedStep(model), torch.tensor(used, dtype=torch.int32)
    # Few programs, which the interpreter runs one by one.
    monkeypatch.setattr(step._projection, "tile_of_nibbles", lambda *sizes: RowTile(64, 16, 4, 0))
    if rows == 1:
        monkeypatch.setattr(torch.nn.Linear, "forward", None)
    logits = step(ids, slots, state.positions, list(state.layers))
    assert relative_error(logits, exact.logits) <= BF16_MODEL


@needs_interpreter
def test_greedy_rows_take_the_token_that_the_step_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph found on the device; others are drawn from the logits."""
    from transnormer.ops.decode import triton_pointwise

    def found(logits: Tensor, limit: int | None) -> Tensor:
        flat = logits.flatten(0, 1)
        return triton_pointwise.best(flat, limit, overlap=False).view(2, *logits.shape[:2])

    calls: list[int] = []
    draw = slots.draw

    def counted(logits: Tensor, *rest: object) -> Tensor:
        calls.append(len(logits))
        return draw(logits, *rest)

    monkeypatch.setattr(pool, "likeliest", found)
    monkeypatch.setattr(slots, "draw", counted)
    model, prompts = make_model(), prompts_of((5, 1, 9))
    engine = engine_of(model, prefill_tokens=64)
    requests = [engine.submit(p, max_new_tokens=6, sampling=GREEDY, logprobs=1) for p in prompts]
    engine.run()
    assert_all_alone(model, prompts, requests)
    # Those after the prompts, which are read in one call.
    assert calls == [len(prompts)]
    for request in requests:
        assert [entry.top[0][0] for entry in request.logprobs] == request.token_ids


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: zoo.get("small-retnet"), r"blocks\[0\].token_mixer.kind is 'retention'"),
        (lambda: variant_config({"gate": "low_rank"}), r"token_mixer.gate is 'low_rank'"),
        (lambda: variant_config({"bias": True}), r"blocks\[0\].token_mixer.bias is True"),
        (lambda: variant_config(norm=NormConfig(kind="rms")), r"blocks\[0\].norm.kind is 'rms'"),
        (lambda: tnl_config(max_positions=9), "max_positions is 9; expected one of"),
        (lambda: variant_config(glu={"activation": "gelu"}), "channel_mixer.activation is 'gelu'"),
    ],
)
@needs_interpreter
def test_a_part_that_the_kernels_do_not_have_is_named(config: object, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        FusedStep(make_model(config()))


def test_fused_steps_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fused is True; expected False with compile"):
        EngineConfig(fused=True, compile=True)
    softmax = make_model(zoo.get("small-llama", vocab_size=VOCAB))
    with pytest.raises(NotImplementedError, match="fused is True; expected False for this model"):
        make_pool(softmax, 2, fused=True)
    monkeypatch.setattr(decode, "why_not", lambda device: "inputs are on cpu; move them to a GPU")
    with pytest.raises(RuntimeError, match="fused is True; expected False here: inputs are on"):
        FusedStep(make_model())
    assert fused.likeliest(torch.zeros(1, 1, 4), None) is None
