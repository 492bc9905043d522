"""LoRA by peft: adapters on a decoder, and checkpoints that hold the merged model beside them."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transnormer.models import checkpoint, tensor_files
from transnormer.models.decoder import Decoder
from transnormer.train.lora_config import LoraConfig

# A folder of its own: transformers, which takes an adapter beside a model for one that is not in its
# weights yet, would add it twice.
FOLDER, _TENSORS = "adapter", "adapter_model.safetensors"
# The frozen weights, inside the run's data.
BASE = "base"
_NAME = "default"
# As large as entries of weights are.
_OPEN = 0.02
# What a decoder's modules are called in peft's model around the one for transformers.
_OUTER = "base_model.model.model.transnormer."


def add_adapters(model: checkpoint.AnyModel, config: LoraConfig, source: str) -> None:
    """Put adapters on a decoder's projections, in place, and freeze everything else.

    Those of a decoder on the meta device have values all the same, on the CPU.

    Args:
        model: a decoder without adapters.
        config: of the run.
        source: what the frozen weights are called in peft's file.

    Raises:
        ValueError: a target that the model does not have.
        RuntimeError: peft is not installed.
    """
    assert isinstance(model, Decoder)
    peft = _peft()
    linear = [name for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for index, target in enumerate(config.targets or ()):
        if target not in known:
            raise ValueError(
                f"lora.targets[{index}] is {target!r}; expected some of {', '.join(known)}"
            )
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets or known),
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
    )
    with _weights_of_one_number(model):
        peft.inject_adapter_in_model(adapter, model, adapter_name=_NAME)


@contextmanager
def _weights_of_one_number(model: nn.Module) -> Iterator[None]:
    """Let projections on the meta device have a number on the CPU that stands for all of theirs.

    peft draws an adapter's values and then puts it where the weight lies, without them on that device.
    """
    absent = {
        module: module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.is_meta
    }
    for module, weight in absent.items():
        module.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    try:
        yield
    finally:
        for module, weight in absent.items():
            module.weight = weight.requires_grad_(module.weight.requires_grad)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise RuntimeError("lora needs peft; run: pip install 'transnormer[hf]'") from error


def describe_size(model: nn.Module) -> str:
    """How many parameters a model has, and how many of them get gradients where not all do."""
    every = sum(x.numel() for x in model.parameters())
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    part = "" if trained == every else f", {trained:,} of them trained,"
    return f"{every:,} parameters{part}"


def write_model(
    model: checkpoint.AnyModel, directory: Path, *, tokenizer_fingerprint: str | None = None
) -> None:
    """Write a model's weights and config.json into a directory that exists.

    Of a model with adapters these are the merged weights, W + (alpha / rank) B A, summed in float32
    and rounded to W's dtype; adapter/ beside them has peft's two files.
    """
    tensors = model.state_dict()
    adapters = {name: x for name, x in tensors.items() if is_adapter(name)}
    if not adapters:
        checkpoint.write_weights(model, directory, tokenizer_fingerprint=tokenizer_fingerprint)
        return
    assert isinstance(model, Decoder)
    with torch.device("meta"):
        plain = Decoder(model.config)
    plain.load_state_dict(merged(model, tensors), assign=True)
    checkpoint.write_weights(plain, directory, tokenizer_fingerprint=tokenizer_fingerprint)
    write_adapter(model, adapters, directory)


def write_adapter(model: nn.Module, adapters: Mapping[str, Tensor], directory: Path) -> None:
    """Write peft's two files into a new folder inside a directory."""
    named = {
        _OUTER + name.replace(f".{_NAME}.", "."): x.detach().cpu().contiguous()
        for name, x in adapters.items()
    }
    folder = directory / FOLDER
    folder.mkdir()
    save_file(named, folder / _TENSORS, metadata={"format": "pt"})
    layers: Any = model
    layers.peft_config[_NAME].save_pretrained(str(folder))


def like(model: nn.Module, plain: nn.Module) -> nn.Module:
    """A decoder without adapters with those that another one has, unfilled."""
    layers: Any = model
    return _peft().inject_adapter_in_model(layers.peft_config[_NAME], plain, adapter_name=_NAME)


@torch.no_grad()
def open_adapters(model: nn.Module) -> None:
    """Make every B constant: while it is 0, where it begins, A has no gradient."""
    for name, x in model.named_parameters():
        if ".lora_B." in name:
            x.fill_(_OPEN)


def added(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, summed in float32 and rounded to W's dtype."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def merged(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    add: Callable[[Tensor, Tensor, Tensor, float], Tensor] = added,
) -> dict[str, Tensor]:
    """The tensors of a decoder without adapters that computes the same.

    Args:
        model: with adapters.
        tensors: its own, by name.
        add: as ``added``, of tensors as the model has them.
    """
    found = {}
    for name, x in tensors.items():
        if not is_adapter(name):
            found[name.replace(".base_layer.", ".")] = x.detach()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            a, b = layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()
            found[f"{name}.weight"] = add(found[f"{name}.weight"], a, b, layer.scaling[_NAME])
    return found


def beside_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a decoder without adapters by the names that they have in a model with them."""
    names = {name.replace(".base_layer.", "."): name for name in model.state_dict()}
    return {names[name]: x for name, x in tensors.items()}


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def read_weights(
    step: Path, base: Path, *, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The tensors of the model that wrote a step, by the names that they have in training.

    Args:
        step: a checkpoint.
        base: where the frozen weights are, for a model with adapters.
        device: where to put them.

    Raises:
        FileNotFoundError, ValueError: as ``checkpoint.load_any``.
    """
    file = step / FOLDER / _TENSORS
    if not file.is_file():
        return checkpoint.load_any(step, device=device).state_dict()
    frozen = checkpoint.load_any(base, device=device).state_dict()
    return _in_training(load_file(file, device=str(device or "cpu")), frozen)


def open_weights(step: Path, base: Path) -> Mapping[str, Any]:
    """As ``read_weights``, of tensors that are read when they are sliced."""
    file = step / FOLDER / _TENSORS
    if not file.is_file():
        return tensor_files.open_tensors(step, "model")
    return _in_training(tensor_files.OpenTensors([file]), tensor_files.open_tensors(base, "model"))


def _in_training(adapters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of peft's file and of a decoder by the names of a decoder with adapters."""
    found = {}
    for name, x in adapters.items():
        inner = name.removeprefix(_OUTER).removesuffix(".weight")
        found[f"{inner}.{_NAME}.weight"] = x
    layers = {name.split(".lora_")[0] for name in found}
    for name, x in frozen.items():
        layer, _, last = name.rpartition(".")
        found[f"{layer}.base_layer.{last}" if layer in layers else name] = x
    return found
