"""LoRA adapters as peft writes them: the logits of peft's model, merged and not, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config
from safetensors.torch import load_file, save_file
from tolerances import BF16_MODEL, DECODER_FLOAT32, relative_error
from torch import Tensor

from transnormer.infer.lora import merge_adapter
from transnormer.infer.quantize import quantize
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder

PROJECTIONS = ("qkvu_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = "base_model.model.model.transnormer.blocks.1."


def write_adapter(
    folder: Path,
    model: Decoder,
    targets: tuple[str, ...] = PROJECTIONS,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """An adapter of rank 2 on some projections, in the files and names that peft has."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            outputs, inputs = module.weight.shape
            base = f"base_model.model.model.transnormer.{name}"
            for part, shape in (("A", (2, inputs)), ("B", (outputs, 2))):
                x = torch.randn(shape, generator=generator) * 0.3
                tensors[f"{base}.lora_{part}.weight"] = x.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, lambda name: 1.5),
        ({"use_rslora": True}, lambda name: 3 / 2**0.5),
        ({"alpha_pattern": {"out_proj": 8}}, lambda name: 4.0 if "out_proj" in name else 1.5),
        (
            {"r": 7, "rank_pattern": {".*proj": 2}, "alpha_pattern": {"blocks.1.*": 5}},
            lambda name: 2.5 if "blocks.1." in name else 1.5,
        ),
    ],
    ids=["plain", "rslora", "alpha", "patterns"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_get_the_scaled_product(
    tmp_path: Path, options: dict[str, Any], scale: Callable[[str], float], dtype: torch.dtype
) -> None:
    model, before = make_model(dtype=dtype), make_model(dtype=dtype)
    folder = write_adapter(tmp_path, model, ("out_proj", "up_proj"), **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = merge_adapter(model, folder)
    assert names == sorted(
        n for n, _ in model.named_modules() if n.endswith(("out_proj", "up_proj"))
    )
    for name, old in before.named_parameters():
        module = name.removesuffix(".weight")
        exact = old.detach().double()
        if module in names:
            key = f"base_model.model.model.transnormer.{module}.lora_"
            a, b = (tensors[f"{key}{part}.weight"].double() for part in "AB")
            exact = exact + scale(module) * b @ a
        made = model.get_parameter(name).detach()
        assert made.dtype == old.dtype
        assert torch.allclose(made.double(), exact, rtol=torch.finfo(old.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_model_has_the_logits_of_pefts(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    from transnormer.hf.modeling import TransnormerDecoderForCausalLM as ForCausalLM

    model, ids = make_model(), make_ids(2, 12)
    checkpoint.save(model, tmp_path / "base")
    theirs = ForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["qkvu_proj", "down_proj"],
        use_rslora=rslora,
        rank_pattern={"down_proj": 3},
        alpha_pattern={"blocks.0.token_mixer.qkvu_proj": 9},
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    plain, exact = model(ids).logits, adapted(ids).logits.clone()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert relative_error(exact, plain) > 0.1
    merge_adapter(model, tmp_path / "adapter")
    assert relative_error(model(ids).logits, exact) <= DECODER_FLOAT32
    assert (
        relative_error(model(ids).logits, adapted.merge_and_unload()(ids).logits) <= DECODER_FLOAT32
    )


def test_an_adapter_of_another_dtype_is_added_all_the_same(tmp_path: Path) -> None:
    model, other, ids = make_model(), make_model(), make_ids(2, 12)
    merge_adapter(model, write_adapter(tmp_path, model))
    merge_adapter(other, write_adapter(tmp_path, model, dtype=torch.bfloat16))
    assert 0 < relative_error(other(ids).logits, model(ids).logits) <= BF16_MODEL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_another_kind_of_adapter_is_refused_by_its_field(
    tmp_path: Path, field: str, value: object
) -> None:
    model = make_model()
    folder = write_adapter(tmp_path, model, **{field: value})
    with pytest.raises(NotImplementedError, match=rf"adapter_config.json: {field} is "):
        merge_adapter(model, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.clear(), "holds no tensors; expected lora_A and lora_B"),
        (
            lambda x: x.pop(f"{BLOCK}token_mixer.out_proj.lora_B.weight"),
            r"holds blocks.1.token_mixer.out_proj.lora_A.weight alone; expected lora_A and lora_B",
        ),
        (
            lambda x: x.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 3)}),
            "holds base_model.model.lm_head.lora_A.weight; expected lora_A and lora_B of proj",
        ),
        (
            lambda x: x.update({f"{BLOCK}token_mixer.out_proj.lora_A.weight": torch.ones(2, 3)}),
            r"blocks.1.token_mixer.out_proj has lora_A \[2, 3\] and lora_B \[32, 2\]; expected",
        ),
        (
            lambda x: x.update({f"{BLOCK}token_mixer.out_proj.lora_A.weight": torch.ones(3, 32)}),
            r"blocks.1.token_mixer.out_proj has the ranks 3 and 2; expected one",
        ),
    ],
    ids=["empty", "half", "head", "shape", "ranks"],
)
def test_a_wrong_adapter_is_named_and_changes_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    model = make_model()
    file = write_adapter(tmp_path, model) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        merge_adapter(model, tmp_path)
    for name, x in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], x)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model, blocks = make_model(), tnl_config().blocks
    folder = write_adapter(tmp_path / "deep", model)
    with pytest.raises(ValueError, match=r"changes blocks.2.*; expected projections of this model"):
        merge_adapter(make_model(tnl_config(blocks=blocks[:2])), folder)
    folder = write_adapter(tmp_path / "rank", model, r=3)
    with pytest.raises(ValueError, match=r"the rank of .*_proj is 3; expected 2, that of its"):
        merge_adapter(model, folder)
    folder = write_adapter(tmp_path / "alpha", model, lora_alpha=None)
    with pytest.raises(ValueError, match=r"the lora_alpha of .* is None; expected a number"):
        merge_adapter(model, folder)


def test_files_that_are_absent_or_damaged_are_named(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(
        FileNotFoundError, match="holds no adapter_config.json; expected an adapter"
    ):
        merge_adapter(model, tmp_path)
    folder = write_adapter(tmp_path, model)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        merge_adapter(model, folder)


def test_quantised_weights_take_no_adapter(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = make_model()
    folder = write_adapter(tmp_path, model)
    quantize(model, 8)
    with pytest.raises(NotImplementedError, match="merge the adapter first, then quantise"):
        merge_adapter(model, folder)
