"""Weight-only integers: how far outputs move, what they weigh, and that everything still runs."""

from pathlib import Path

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model
from engine_cases import GREEDY, alone, engine_of
from safetensors.torch import load_file, save_file
from tolerances import BF16_MODEL, QUANTIZED_LOGITS, assert_close, relative_error
from torch import nn

from transnormer.cli.app import run
from transnormer.data.tokenizers.byte import ByteTokenizer
from transnormer.infer import quantize as quantization
from transnormer.infer.gptq import gptq
from transnormer.infer.quantize import four_bits, quantize
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder
from transnormer.models.quantized_weights import ByRowsLinear
from transnormer.models.state import DecoderState
from transnormer.ops import few_rows


def wide_model(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A model whose rows have 64 and 128 weights."""
    config = zoo.tnl_custom(vocab_size=VOCAB, model_dim=64, num_layers=2, heads=2, glu_dim=128)
    return make_model(config.model_copy(update={"init_std": 0.1}), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_move_by_the_rounding_of_the_weights(bits: int, dtype: torch.dtype) -> None:
    model, ids = wide_model(dtype), make_ids(2, 30)
    exact = model(ids).logits
    quantize(model, bits, group_size=32)
    error = relative_error(model(ids).logits, exact)
    assert QUANTIZED_LOGITS[bits] / 8 <= error <= QUANTIZED_LOGITS[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_only_projections_inside_blocks_change(bits: int) -> None:
    model, original = wide_model(), wide_model()
    quantize(model, bits, group_size=32)
    for name, x in original.named_parameters():
        changed = type(model.get_parameter(name)) is not type(x)
        owner = original.get_submodule(name.rpartition(".")[0])
        assert changed == (isinstance(owner, nn.Linear) and name.startswith("blocks."))
        if changed:
            assert model.get_parameter(name).qdata.dtype == torch.int8


@pytest.mark.parametrize("bits", [8, 4])
def test_the_engine_runs_what_is_quantised(bits: int, tmp_path: Path) -> None:
    model = wide_model(torch.float32)
    plain = model.fingerprint()
    quantize(model, bits, group_size=32)
    engine = engine_of(model, ring=16)
    prompt = make_ids(1, 6)[0]
    request = engine.submit(prompt, max_new_tokens=8, sampling=GREEDY, keep_state=True)
    assert request.result() == alone(model, prompt, 8, temperature=0.0)
    assert model.fingerprint() != plain
    request.state.save(tmp_path / "state", model)
    assert DecoderState.load(tmp_path / "state", model).positions.tolist() == [14]
    with pytest.raises(ValueError, match="is the state of the model"):
        DecoderState.load(tmp_path / "state", wide_model(torch.float32))


class Int4TilePackedTo4dTensor:
    """A tile-packed weight as ``four_bits`` sees it: its product, scales and zeros."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        self.shape, self.device = weight.shape, weight.device
        self.block_size = [1, weight.shape[1] // scales.shape[1]]
        # Groups first, and both dims padded.
        both = torch.stack([scales.T, zeros.T], -1)
        self.scale_and_zero = torch.nn.functional.pad(both, (0, 0, 0, 3, 0, 2), value=1.0)
        self._weight = weight

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> torch.Tensor:
        x, weight = args
        return x @ weight._weight.T


def test_four_bits_are_read_out_of_either_kind_of_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_UNIT_VECTORS", 40)
    ints = torch.randint(0, 16, (6, 96))
    scales, zeros = 0.01 + torch.rand(6, 3).bfloat16(), torch.randn(6, 3).bfloat16()
    scales[2] = 0.0
    wide = [x.float().repeat_interleave(32, 1) for x in (scales, zeros)]
    packed = Int4TilePackedTo4dTensor(((ints - 8) * wide[0] + wide[1]).bfloat16(), scales, zeros)
    found = four_bits(packed)
    assert found is not None
    assert torch.equal(found[0][scales[:, 0] > 0], ints[scales[:, 0] > 0])
    assert torch.equal(found[1], scales)
    assert torch.equal(found[2], zeros)
    model = wide_model()
    assert four_bits(model.blocks[0].token_mixer.qkvu_proj.weight) is None
    quantize(model, 4, group_size=32)
    weight = model.blocks[0].token_mixer.qkvu_proj.weight
    ints, scales, zeros = four_bits(weight)
    exact = weight.dequantize()
    assert torch.equal(((ints - 8) * scales.repeat_interleave(32, 1)).bfloat16(), exact)
    assert not zeros.any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="bits is 3; expected 8 or 4"):
        quantize(make_model(), 3)
    with pytest.raises(ValueError, match=r"group_size is 48; expected a divisor of the 64 inputs"):
        quantize(wide_model(), 4, group_size=48)
    with pytest.raises(ValueError, match="group_size is 0; expected at least 1"):
        quantize(wide_model(), 4, group_size=0)
    with pytest.raises(TypeError, match="group_size is 32.0; expected an integer"):
        quantize(wide_model(), 4, group_size=32.0)
    model = wide_model()
    quantize(model, 8)
    with pytest.raises(ValueError, match=r"qkvu_proj.weight is a Int8Tensor; expected plain wei"):
        quantize(model, 4, group_size=32)


def test_calibration_without_texts_is_refused_and_bad_texts_leave_nothing_behind() -> None:
    model = wide_model()
    with pytest.raises(ValueError, match="calibration is empty; expected at least one batch"):
        quantize(model, 4, group_size=32, calibration=iter(()))
    with pytest.raises(ValueError, match="input_ids holds"):
        quantize(model, 4, group_size=32, calibration=[make_ids(1, 8), make_ids(1, 8) + VOCAB])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(type(x) is nn.Parameter for x in model.parameters())


def correlated(tokens: int, inputs: int) -> torch.Tensor:
    """Inputs with strong correlations, as activations have."""
    return torch.randn(tokens, 8) @ torch.randn(8, inputs) + 0.1 * torch.randn(tokens, inputs)


def dense(ints: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return ints * scales.repeat_interleave(ints.shape[1] // scales.shape[1], 1)


def test_gptq_keeps_outputs_closer_than_rounding_does() -> None:
    weight, x, unseen = torch.randn(24, 64), correlated(500, 65), correlated(1, 1)
    x, unseen = x[:400, :64], x[400:, :64]
    nearest = dense(*gptq(weight, torch.eye(64), 32))
    rounded = dense(*gptq(weight, x.T @ x, 32))
    assert relative_error(unseen @ rounded.T, unseen @ weight.T) < 0.5 * relative_error(
        unseen @ nearest.T, unseen @ weight.T
    )


def test_gptq_of_independent_inputs_is_rounding_to_the_nearest() -> None:
    weight = torch.randn(5, 24)
    ints, scales = gptq(weight, 3.0 * torch.eye(24), 8)
    groups = weight.unflatten(1, (3, 8))
    exact = groups.abs().amax(-1) / 7
    assert torch.allclose(scales, exact)
    assert torch.equal(ints, (groups / exact[..., None]).round().flatten(1).to(torch.int8))


def test_gptq_stands_inputs_and_weights_that_are_always_zero() -> None:
    weight, x = torch.randn(4, 16), torch.randn(50, 16)
    weight[1], x[:, 3] = 0.0, 0.0
    ints, scales = gptq(weight, x.T @ x, 8)
    assert not ints[1].any()
    assert torch.isfinite(scales).all()
    assert torch.isfinite(dense(*gptq(weight, torch.zeros(16, 16), 8))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_calibrated_models_are_closer_than_rounded_ones(dtype: torch.dtype) -> None:
    ids, texts = make_ids(2, 40, seed=9), [make_ids(4, 60, seed=seed) for seed in range(3)]
    exact = wide_model(dtype)(ids).logits
    errors = []
    for calibration in (None, texts):
        model = wide_model(dtype)
        quantize(model, 4, group_size=32, calibration=calibration)
        errors.append(relative_error(model(ids).logits, exact))
        assert model.blocks[1].token_mixer.out_proj.weight.qdata.dtype == torch.int8
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="calibration is given; expected None for 8 bits"):
        quantize(wide_model(), 8, calibration=texts)


def test_calibration_uses_the_inputs_that_the_rounded_blocks_before_give() -> None:
    texts = [make_ids(4, 60, seed=seed) for seed in range(2)]
    model, original = wide_model(torch.float32), wide_model(torch.float32)
    quantize(model, 4, group_size=32, calibration=texts)
    for index in range(2):
        projection = model.blocks[index].token_mixer.qkvu_proj
        inputs: list[torch.Tensor] = []
        hook = projection.register_forward_pre_hook(
            lambda module, arguments, inputs=inputs: inputs.append(arguments[0].flatten(0, 1))
        )
        for ids in texts:
            model(ids)
        hook.remove()
        moments = sum(x.T @ x for x in inputs)
        weight = original.blocks[index].token_mixer.qkvu_proj.weight
        assert torch.equal(projection.weight.qdata, gptq(weight, moments, 32)[0])
        nearest = gptq(weight, torch.eye(64), 32)[0]
        assert not torch.equal(projection.weight.qdata, nearest)


@pytest.mark.parametrize("inputs", [72, 96, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_rows_read_int8_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, inputs: int
) -> None:
    config = zoo.tnl_custom(vocab_size=61, model_dim=inputs, num_layers=1, heads=2, glu_dim=50)
    model = make_model(config, dtype)
    quantize(model, 8)
    projection = model.blocks[0].channel_mixer.gate_proj
    assert isinstance(projection, ByRowsLinear)
    weight = projection.weight.qdata.double() * projection.weight.scale.double()
    for shape in ((1, 1), (2, 3), (1, 40)):
        x = torch.randn(*shape, inputs).to(dtype)
        exact = x.double() @ weight.T
        assert_close(projection(x), exact)
    # Without products of integers only inputs in whole groups of 32 have a kernel, which makes no
    # copy of the weight.
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    if inputs % 32 == 0 or few_rows.reads_integers(inputs):
        assert projection(torch.ones(2, 3, inputs, dtype=dtype)).shape == (2, 3, 50)
    else:
        with pytest.raises(TypeError, match="not callable"):
            projection(torch.ones(1, inputs, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bits", "calibrated"), [(8, False), (4, False), (4, True)], ids=["int8", "nearest", "gptq"]
)
def test_what_is_quantised_is_saved_and_loaded_as_it_is(
    tmp_path: Path, bits: int, calibrated: bool, dtype: torch.dtype
) -> None:
    model, ids = wide_model(dtype), make_ids(2, 30)
    checkpoint.save(model, tmp_path / "plain")
    texts = [make_ids(4, 60)] if calibrated else None
    quantize(model, bits, group_size=32, calibration=texts)
    checkpoint.save(model, tmp_path / "rounded")
    again = checkpoint.load(tmp_path / "rounded")
    assert torch.equal(again(ids).logits, model(ids).logits)
    # States of one are states of the other.
    assert again.fingerprint() == model.fingerprint()
    names = ("plain", "rounded")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in names]
    assert sizes[1] < sizes[0] * {8: 0.75, 4: 0.55}[bits]
    with pytest.raises(ValueError, match="expected plain weights; load the model again"):
        quantize(again, 8)


def test_a_quantised_model_is_loaded_in_another_dtype(tmp_path: Path) -> None:
    model, ids = wide_model(torch.float32), make_ids(2, 30)
    quantize(model, 8)
    checkpoint.save(model, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model", dtype=torch.bfloat16)
    assert relative_error(again(ids).logits, model(ids).logits) <= BF16_MODEL


def test_the_released_layout_has_no_quantised_weights(tmp_path: Path) -> None:
    model = wide_model()
    checkpoint.save(model, tmp_path / "model")
    quantize(model, 8)
    with pytest.raises(NotImplementedError, match="the model is quantised .*; expected plain wei"):
        checkpoint.save(model, tmp_path / "model", layout="released")
    assert checkpoint.load(tmp_path / "model").config == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("scale"), r"holds .*qkvu_proj.weight.packed; expected .*weight.scale bes"),
        (lambda x: x.update(scale=x["scale"][:, :1].repeat(1, 3)), "expected the same rows, and"),
        (lambda x: x.update(packed=x["packed"].to(torch.int8)), "expected the same rows, and"),
        (lambda x: x.update(packed=x["packed"][:, :16]), r"has shape \[256, 32\]; expected"),
    ],
    ids=["no scales", "groups", "dtype", "shape"],
)
def test_damaged_integers_are_named(tmp_path: Path, change: object, message: str) -> None:
    model = wide_model()
    quantize(model, 4, group_size=32)
    checkpoint.save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors, base = load_file(file), "blocks.0.token_mixer.qkvu_proj.weight"
    parts = {name: tensors.pop(f"{base}.{name}") for name in ("packed", "scale")}
    change(parts)
    save_file(tensors | {f"{base}.{name}": x.contiguous() for name, x in parts.items()}, file)
    checkpoint.add_hashes(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize("bits", [8, 4])
def test_the_command_continues_a_quantised_model(tmp_path: Path, bits: int) -> None:
    config = zoo.tnl_custom(vocab_size=259, model_dim=64, num_layers=1, heads=2, glu_dim=128)
    model = make_model(config)
    quantize(model, bits, group_size=32)
    checkpoint.save(model, tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    options = ["--prompt", "ab", "--max-new-tokens", "3", "--seed", "1"]
    assert run(["generate", str(tmp_path / "model"), *options]) == 0
