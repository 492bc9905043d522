"""Saving and loading models: a directory with config.json and weights, written at once or not.

The layout of this package is ``config.json`` (the decoder's configuration, a format number and the
SHA-256 of each weight file) beside ``model.safetensors``, or shards with their index.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from transnormer import files
from transnormer.config import validate
from transnormer.data.tokenizers import find_tokenizer_file
from transnormer.models import tensor_files
from transnormer.models.convert import released
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.tensor_files import StoredTensor
from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import FLOAT_DTYPES

Layout = Literal["transnormer", "released"]

CONFIG = "config.json"
COMPLETE = "COMPLETE"
MODEL_TYPE = "transnormer_decoder"
FORMAT = 1
_STEP = re.compile(r"step_(\d+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.tiktoken"]
# What a saved model's directory may hold; anything else in it is somebody's and is not replaced.
_OWN_FILES = re.compile(
    r"config\.json|model.*\.safetensors|model\.safetensors\.index\.json|(byte_)?tokenizer.*|"
    r".*\.tiktoken"
)


def save(model: Decoder, path: str | Path, *, layout: Layout = "transnormer") -> None:
    """Write a model as a directory, which appears whole or not at all.

    Args:
        model: what to write, in its dtype.
        path: the directory; a saved model there is replaced, a tokenizer beside it removed.
        layout: "transnormer", or "released" for the layout of the released TransNormerLLM.

    Raises:
        NotImplementedError: the released layout cannot express the model; the field is named.
        ValueError: an unknown layout, or path holds something that is not a saved model.
        TypeError: a model that is no ``Decoder``.
    """
    if layout not in ("transnormer", "released"):
        raise ValueError(f"layout is {layout!r}; expected 'transnormer' or 'released'")
    if not isinstance(model, Decoder):
        raise TypeError(f"model is {type(model).__name__}; expected a Decoder")
    # A link stays a link: what it points to is replaced.
    target = Path(path).resolve()
    _check_replaceable(target)
    tensors = dict(model.state_dict())
    raw: dict[str, Any] | None = None
    if layout == "released":
        raw, tensors = released.write(model.config, tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if raw is None:
            write_weights(model, temporary)
        else:
            tensor_files.write_tensors(tensors, temporary)
            files.write_json(raw, temporary / CONFIG)
        temporary.chmod(0o755)
        files.sync(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Load a model in eval mode.

    Args:
        path_or_hub_id: a run directory (its newest complete step is taken), a step directory, a
            saved model, a directory in the released TransNormerLLM layout, or the id of one on the
            Hugging Face hub.
        device: where to put it; None is the CPU.
        dtype: of the weights; None keeps the stored one. Angles and decays stay float32 or better.

    Raises:
        FileNotFoundError: no such directory, or no configuration or weights in it.
        ValueError: a damaged file, or tensors that do not agree with the configuration; both are
            named, and for a step of a run the older one that is whole.
        NotImplementedError: a released configuration with parts that the decoder does not have.
    """
    directory = find_model(path_or_hub_id)
    try:
        config, stored, stored_name = _read(directory)
    except (ValueError, FileNotFoundError) as error:
        older = _whole_step_before(directory)
        if older is None:
            raise
        raise ValueError(f"{error}; {older} is whole: load that") from error
    with torch.device("meta"):
        model = Decoder(config)
    keep = _kept_precise(model)
    _check_tensors(model, stored, directory, stored_name)
    stored_dtype = _common_dtype(stored, keep, directory, dtype)
    tensors = {}
    for name, (tensor, _) in stored.items():
        wanted = torch.promote_types(stored_dtype, torch.float32) if name in keep else stored_dtype
        tensors[name] = tensor.to(device=device or "cpu", dtype=wanted)
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device=device or "cpu", recurse=False)
            methodcaller("reset_parameters")(module)
    return model.requires_grad_(True).eval()


def write_weights(
    model: nn.Module, directory: Path, *, tokenizer_fingerprint: str | None = None
) -> None:
    """Write a decoder's weights and config.json into a directory that exists.

    Args:
        model: a ``Decoder``.
        directory: where to.
        tokenizer_fingerprint: of the tokenizer that the model was trained with.
    """
    assert isinstance(model, Decoder)
    written = tensor_files.write_tensors(model.state_dict(), directory)
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "decoder": model.config.model_dump(mode="json"),
        "weights": {file.name: files.sha256(file) for file in written},
    }
    if tokenizer_fingerprint is not None:
        raw["tokenizer_fingerprint"] = tokenizer_fingerprint
    files.write_json(raw, directory / CONFIG)


def read_config(directory: str | Path) -> DecoderConfig:
    """The configuration of a model's directory; a released one is inferred from its tensors."""
    directory = Path(directory)
    raw = files.read_json(directory / CONFIG)
    if released.is_released(raw):
        stored = tensor_files.read_tensors(directory)
        return released.read(raw, stored, directory / CONFIG)[0]
    return _config_of(raw, directory / CONFIG)


def tokenizer_fingerprint(directory: str | Path) -> str | None:
    """Fingerprint of the tokenizer a model was trained with, where its directory says so."""
    value = files.read_json(Path(directory) / CONFIG).get("tokenizer_fingerprint")
    return None if value is None else str(value)


def newest_complete_step(run_dir: str | Path) -> Path | None:
    """The step directory with the highest step whose COMPLETE marker was written, or None."""
    return next(iter(_complete_steps(Path(run_dir) / "checkpoints")), None)


def find_model(path_or_hub_id: str | Path) -> Path:
    """The directory that holds a model's weights, by a path or a hub id as ``load`` takes them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file, or a step that was not written to its end.
    """
    path = Path(path_or_hub_id)
    if path.is_file():
        raise ValueError(f"{path} is a file; expected the directory that holds it; pass that")
    if not path.is_dir():
        return _from_hub(str(path_or_hub_id))
    if (path / "checkpoints").is_dir():
        step = newest_complete_step(path)
        if step is None:
            raise FileNotFoundError(
                f"{path} holds no complete checkpoint; expected checkpoints/step_*/{COMPLETE}; "
                "train longer, or lower train.save_every"
            )
        return step
    if _STEP.fullmatch(path.name) and not (path / COMPLETE).is_file():
        raise ValueError(
            f"{path} lacks {COMPLETE}; expected a checkpoint written to its end; take an earlier "
            "step"
        )
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} holds no {CONFIG}; expected a run, a step or a saved model; check the path"
        )
    return path


def find_tokenizer(path_or_hub_id: str | Path) -> Path | None:
    """The tokenizer file beside a model's weights, or None where there is none."""
    return find_tokenizer_file(find_model(path_or_hub_id))


def _from_hub(name: str) -> Path:
    missing = f"{name} is not a directory"
    if not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        raise FileNotFoundError(f"{missing}; expected a run, a step or a saved model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{missing}, and the Hugging Face hub gave nothing under this name "
            f"({type(error).__name__}); expected one of the two; check the spelling"
        ) from error


def _config_of(raw: Mapping[str, Any], file: Path) -> DecoderConfig:
    if raw.get("model_type") != MODEL_TYPE or not isinstance(raw.get("decoder"), dict):
        raise ValueError(
            f"{file}: model_type is {raw.get('model_type')!r}; expected {MODEL_TYPE!r} or "
            f"{released.MODEL_TYPE!r}; is this a model's directory?"
        )
    if raw.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format is {raw.get('format')!r}; expected {FORMAT}; update transnormer"
        )
    return validate(DecoderConfig, raw["decoder"], source=str(file))


def _complete_steps(folder: Path) -> list[Path]:
    """The steps in a folder whose COMPLETE marker was written, newest first."""
    steps = []
    for marker in folder.glob(f"step_*/{COMPLETE}"):
        match = _STEP.fullmatch(marker.parent.name)
        if match:
            steps.append((int(match[1]), marker.parent))
    return [path for _, path in sorted(steps, reverse=True)]


def _whole_step_before(step: Path) -> Path | None:
    """The newest readable step before a step; None where there is none, or for what is no step."""
    steps = _complete_steps(step.parent)
    for older in steps[steps.index(step) + 1 :] if step in steps else ():
        try:
            _read(older)
        except (ValueError, FileNotFoundError):
            continue
        return older
    return None


def _read(
    directory: Path,
) -> tuple[DecoderConfig, dict[str, StoredTensor], Callable[[str], str]]:
    """Configuration and tensors of a directory, and what a tensor is called in its files."""
    _check_marker(directory)
    raw = files.read_json(directory / CONFIG)
    if released.is_released(raw):
        stored = tensor_files.read_tensors(directory)
        return *released.read(raw, stored, directory / CONFIG), released.theirs
    config = _config_of(raw, directory / CONFIG)
    _check_hashes(raw, directory)
    return config, tensor_files.read_tensors(directory), str


def _check_marker(directory: Path) -> None:
    """Compare config.json, which holds the hashes of the weights, with a step's COMPLETE marker."""
    if not (directory / COMPLETE).is_file():
        return
    listed = files.read_json(directory / COMPLETE).get("files", {})
    expected = listed.get(CONFIG, {}).get("sha256") if isinstance(listed, dict) else None
    if expected is not None and files.sha256(directory / CONFIG) != expected:
        raise ValueError(
            f"{directory / CONFIG} has another SHA-256 than {COMPLETE} says; expected the file as "
            "it was written; copy it again"
        )


def _check_hashes(raw: Mapping[str, Any], directory: Path) -> None:
    hashes = raw.get("weights")
    if not isinstance(hashes, dict) or not hashes:
        raise ValueError(f"{directory / CONFIG} has no weights; expected the SHA-256 of each file")
    for name, expected in hashes.items():
        file = directory / str(name)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is absent; expected it, as {CONFIG} names it")
        found = files.sha256(file)
        if found != expected:
            raise ValueError(
                f"{file} has SHA-256 {found[:12]}...; expected {str(expected)[:12]}..., as "
                f"{CONFIG} says; it was changed or damaged; copy it again"
            )


def _kept_precise(model: nn.Module) -> set[str]:
    """Names of parameters that stay float32 or better in a model of any dtype."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, KeepPrecision)
        for name, _ in module.named_parameters(recurse=False)
    }


def _check_tensors(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    directory: Path,
    stored_name: Callable[[str], str],
) -> None:
    expected = model.state_dict()
    for name, meta in expected.items():
        if name not in stored:
            raise ValueError(
                f"{directory} lacks {stored_name(name)}; expected it in its weight files"
            )
        tensor, file = stored[name]
        if tensor.shape != meta.shape:
            raise ValueError(
                f"{file}: {stored_name(name)} has shape {list(tensor.shape)}; expected "
                f"{list(meta.shape)}, by {directory / CONFIG}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {stored_name(name)} is {tensor.dtype}; expected a floating dtype"
            )
    for name, (_, file) in stored.items():
        if name not in expected:
            raise ValueError(
                f"{file} holds {stored_name(name)}; expected only the tensors of the model that "
                f"{directory / CONFIG} describes"
            )


def _common_dtype(
    stored: Mapping[str, StoredTensor],
    keep: set[str],
    directory: Path,
    dtype: torch.dtype | None,
) -> torch.dtype:
    if dtype is not None:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype!r}; expected a torch dtype, float16 to float64")
        return dtype
    found = {x.tensor.dtype for name, x in stored.items() if name not in keep}
    if len(found) > 1:
        names = ", ".join(sorted(str(x).removeprefix("torch.") for x in found))
        raise ValueError(f"{directory} stores weights in {names}; expected one dtype; pass dtype=")
    return found.pop()


def _check_replaceable(target: Path) -> None:
    if target.is_dir():
        strangers = sorted(p.name for p in target.iterdir() if not _OWN_FILES.fullmatch(p.name))
        if strangers:
            raise ValueError(
                f"{target} holds {strangers[0]}; expected a saved model or an empty directory; "
                "choose another path"
            )
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target} is a file; expected a directory; choose another path")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename over target; a directory with files has to step aside first."""
    if target.is_dir() and any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(aside)
        temporary.replace(target)
        shutil.rmtree(aside)
    else:
        temporary.replace(target)
    files.sync(target.parent)


__all__ = [
    "COMPLETE",
    "CONFIG",
    "Layout",
    "find_model",
    "find_tokenizer",
    "load",
    "newest_complete_step",
    "read_config",
    "save",
    "tokenizer_fingerprint",
    "write_weights",
]
