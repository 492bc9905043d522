"""Saving and loading models: a directory with config.json and weights, written at once or not.

The layout of this package is ``config.json`` (the model's configuration under a key that says what
it is, a format number and the SHA-256 of each weight file) beside ``model.safetensors``, or shards
with their index.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from transnormer import files
from transnormer.config import validate
from transnormer.data.tokenizers import find_tokenizer_file
from transnormer.models import quantized_weights, tensor_files
from transnormer.models.assembly import CONFIG, assemble
from transnormer.models.classifier import ClassifierConfig, SequenceClassifier
from transnormer.models.convert import llama, released
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.directories import replaced
from transnormer.models.tensor_files import StoredTensor

Layout = Literal["transnormer", "released"]
AnyModel = Decoder | SequenceClassifier
AnyConfig = DecoderConfig | ClassifierConfig

COMPLETE = "COMPLETE"
MODEL_TYPE = "transnormer_decoder"
CLASSIFIER_TYPE = "transnormer_classifier"
FORMAT = 1
# For each model_type the key of config.json that holds the configuration, and its schema.
_DECODER, _CLASSIFIER = "decoder", "classifier"
_SCHEMAS: dict[str, tuple[str, type[AnyConfig]]] = {
    MODEL_TYPE: (_DECODER, DecoderConfig),
    CLASSIFIER_TYPE: (_CLASSIFIER, ClassifierConfig),
}
_STEP = re.compile(r"step_(\d+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.tiktoken"]


def save(model: AnyModel, path: str | Path, *, layout: Layout = "transnormer") -> None:
    """Write a model as a directory, which appears whole or not at all.

    Args:
        model: what to write, in its dtype.
        path: the directory; a saved model there is replaced, a tokenizer beside it removed.
        layout: "transnormer", or "released" for the layout of the released TransNormerLLM.

    Raises:
        NotImplementedError: the released layout cannot express the model; the field is named. Weights
            that were quantised on a GPU to 4 bits.
        ValueError: an unknown layout, or path holds something that is not a saved model.
        TypeError: a model that is no ``Decoder`` and no ``SequenceClassifier``.
    """
    if layout not in ("transnormer", "released"):
        raise ValueError(f"layout is {layout!r}; expected 'transnormer' or 'released'")
    if not isinstance(model, AnyModel):
        raise TypeError(
            f"model is {type(model).__name__}; expected a Decoder or a SequenceClassifier"
        )
    tensors = dict(model.state_dict())
    raw: dict[str, Any] | None = None
    if layout == "released":
        if not isinstance(model, Decoder):
            raise NotImplementedError(
                "model is a SequenceClassifier; expected a Decoder, which is all that the released "
                "layout can hold; save with layout='transnormer'"
            )
        if (rounded := set(quantized_weights.plain_parts(tensors)) - set(tensors)) != set():
            raise NotImplementedError(
                f"the model is quantised ({min(rounded)}); expected plain weights for the released "
                "layout; save with layout='transnormer'"
            )
        raw, tensors = released.write(model.config, tensors)
    with replaced(path) as directory:
        if raw is None:
            write_weights(model, directory)
        else:
            tensor_files.write_tensors(tensors, directory)
            files.write_json(raw, directory / CONFIG)


def load(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Load a decoder in eval mode.

    Args:
        path_or_hub_id: a run directory (its newest complete step is taken), a step directory, a
            saved model, a directory in the released TransNormerLLM layout or in Hugging Face's
            LLaMA layout, or the id of one on the Hugging Face hub.
        device: where to put it; None is the CPU.
        dtype: of the weights; None keeps the stored one. Angles and decays stay float32 or better.

    Raises:
        FileNotFoundError: no such directory, or no configuration or weights in it.
        ValueError: a damaged file, or tensors that do not agree with the configuration; both are
            named, and for a step of a run the older one that is whole. A sequence classifier, whose
            head a decoder would lose.
        NotImplementedError: a foreign configuration with parts that the decoder does not have.
    """
    model = load_any(path_or_hub_id, device=device, dtype=dtype)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{path_or_hub_id} is a sequence classifier; expected a decoder; load it with "
            "transnormer.load_classifier"
        )
    return model


def load_classifier(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceClassifier:
    """Load a sequence classifier in eval mode; arguments and errors are ``load``'s.

    Raises:
        ValueError: also for a decoder, which has no classes.
    """
    model = load_any(path_or_hub_id, device=device, dtype=dtype)
    if not isinstance(model, SequenceClassifier):
        raise ValueError(
            f"{path_or_hub_id} is a decoder; expected a sequence classifier; load it with "
            "transnormer.load"
        )
    return model


def load_any(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> AnyModel:
    """Load whichever kind of model a directory holds; arguments and errors are ``load``'s."""
    directory = find_model(path_or_hub_id)
    try:
        config, stored, stored_name = _read(directory)
    except (ValueError, FileNotFoundError) as error:
        older = _whole_step_before(directory)
        if older is None:
            raise
        raise ValueError(f"{error}; {older} is whole: load that") from error
    with torch.device("meta"):
        model = _new(config)
    stored, rounded = quantized_weights.split(stored)
    assemble(model, stored, directory, stored_name, device=device, dtype=dtype)
    quantized_weights.install_all(model, rounded)
    return model


def new_like(directory: str | Path) -> AnyModel:
    """A model as the step or saved model in a directory, on the CPU, with weights of its own."""
    file = Path(directory) / CONFIG
    return _new(_config_of(files.read_json(file), file))


def _new(config: AnyConfig) -> AnyModel:
    return Decoder(config) if isinstance(config, DecoderConfig) else SequenceClassifier(config)


def describe(model: nn.Module) -> dict[str, Any]:
    """A model's configuration as config.json has it, under ``decoder`` or ``classifier``."""
    assert isinstance(model, AnyModel)
    key = _DECODER if isinstance(model, Decoder) else _CLASSIFIER
    return {key: model.config.model_dump(mode="json")}


def write_weights(
    model: nn.Module,
    directory: Path,
    *,
    tokenizer_fingerprint: str | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a model's weights and config.json into a directory that exists.

    Args:
        model: a ``Decoder`` or a ``SequenceClassifier``.
        directory: where to.
        tokenizer_fingerprint: of the tokenizer that the model was trained with.
        shard_bytes: the most of tensors in one file; larger ones are cut into rows. None is what
            other packages read: shards of 5 GiB with whole tensors.
    """
    most: dict[str, Any] = {"shard_bytes": shard_bytes, "cut_rows": True} if shard_bytes else {}
    tensors = quantized_weights.plain_parts(model.state_dict())
    tensor_files.write_tensors(tensors, directory, **most)
    write_config(model, directory, tokenizer_fingerprint)


def write_config(model: nn.Module, directory: Path, tokenizer_fingerprint: str | None) -> None:
    """Write the config.json of weight files that are there; arguments are ``write_weights``'s."""
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPE if isinstance(model, Decoder) else CLASSIFIER_TYPE,
        "format": FORMAT,
        **describe(model),
        "weights": tensor_files.hashes(directory),
    }
    if tokenizer_fingerprint is not None:
        raw["tokenizer_fingerprint"] = tokenizer_fingerprint
    files.write_json(raw, directory / CONFIG)


def add_hashes(directory: Path) -> None:
    """Put the SHA-256 of each weight file into a config.json that lacks them, as ``load`` wants."""
    if found := tensor_files.hashes(directory):
        raw = {**files.read_json(directory / CONFIG), "weights": found}
        files.write_json(raw, directory / CONFIG)


def read_config(directory: str | Path) -> DecoderConfig:
    """The configuration of a decoder's directory; a released one is inferred from its tensors."""
    directory = Path(directory)
    raw = files.read_json(directory / CONFIG)
    if released.is_released(raw):
        stored = tensor_files.read_tensors(directory)
        return released.read(raw, stored, directory / CONFIG)[0]
    if llama.is_llama(raw):
        return llama.read_config(raw, directory / CONFIG)
    config = _config_of(raw, directory / CONFIG)
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"{directory} is a sequence classifier; expected a decoder")
    return config


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


def _config_of(raw: Mapping[str, Any], file: Path) -> AnyConfig:
    key, schema = _SCHEMAS.get(str(raw.get("model_type")), ("", DecoderConfig))
    if not isinstance(raw.get(key), dict):
        raise ValueError(
            f"{file}: model_type is {raw.get('model_type')!r}; expected {MODEL_TYPE!r}, "
            f"{CLASSIFIER_TYPE!r}, {released.MODEL_TYPE!r} or {llama.MODEL_TYPE!r}; is this a "
            "model's directory?"
        )
    if raw.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format is {raw.get('format')!r}; expected {FORMAT}; update transnormer"
        )
    return validate(schema, raw[key], source=str(file))


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
) -> tuple[AnyConfig, dict[str, StoredTensor], Callable[[str], str]]:
    """Configuration and tensors of a directory, and what a tensor is called in its files."""
    _check_marker(directory)
    raw = files.read_json(directory / CONFIG)
    if released.is_released(raw):
        stored = tensor_files.read_tensors(directory)
        return *released.read(raw, stored, directory / CONFIG), released.theirs
    if llama.is_llama(raw):
        stored = tensor_files.read_tensors(directory)
        return *llama.read(raw, stored, directory / CONFIG), llama.theirs
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


__all__ = [
    "COMPLETE",
    "CONFIG",
    "AnyModel",
    "Layout",
    "describe",
    "find_model",
    "find_tokenizer",
    "load",
    "load_any",
    "load_classifier",
    "newest_complete_step",
    "read_config",
    "save",
    "tokenizer_fingerprint",
    "write_weights",
]
