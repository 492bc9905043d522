"""The card of a model: a README.md that says what it is, what it read, how, and how well it does.

Everything in it is read off the model and the files of its run; nothing is asked and nothing is
guessed. The header is that of cards on the Hugging Face hub: YAML between two lines of dashes.
"""

import json
from pathlib import Path
from typing import Any

from transnormer.files import read_json, write_atomic
from transnormer.models.checkpoint import find_model
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.train.checkpoints import CHECKPOINTS
from transnormer.train.metrics import EVALUATIONS, METRICS, read_records
from transnormer.train.run_directory import CONFIG, RESOLVED

CARD = "README.md"


def card_for(directory: Path, model: Decoder, source: str | Path, layout: str) -> bytes:
    """The card of a model that is to be written; read before that, since it may replace its source.

    Args:
        directory: of the model.
        model: what is written.
        source: where it came from, as ``load`` takes it. A run, or a step of one, fills the card; a
            card beside any other source goes along as it is.
        layout: "transnormer", "released", "hf" or "onnx".
    """
    origin = find_model(source).resolve()
    run_dir = _run_of(origin)
    if run_dir is None and (origin / CARD).is_file():
        return (origin / CARD).read_bytes()
    return card(directory.resolve().name, model, layout, origin, run_dir).encode()


def write_card(directory: Path, text: bytes) -> None:
    """Put a card beside a model that was written."""
    write_atomic(directory / CARD, text)


def card(name: str, model: Decoder, layout: str, origin: Path, run_dir: Path | None) -> str:
    """The text of a card.

    Args:
        name: of the model, its title.
        model: the model.
        layout: of the directory that the card lies in.
        origin: the directory that the weights were read from.
        run_dir: of the run that made them; None says that nothing is known of their training.
    """
    # Not validated: the run may be of another release, whose keys are no longer these.
    config = {} if run_dir is None else read_json(run_dir / CONFIG)
    rows = [] if run_dir is None else _evaluations(run_dir, origin)
    heldout = _heldout(config)
    task = "text-generation" if model.config.causal else "fill-mask"
    parts = [_header(name, task, rows, heldout), f"# {name}", _summary(model)]
    parts += ["## Model", _model(model, layout)]
    if run_dir is None:
        parts += [
            "## Training",
            "These weights were converted from others, and nothing beside them says what they were "
            "trained on, how, and with what result.",
        ]
    else:
        resolved = config.pop(RESOLVED)
        parts += ["## Training data", _data(config, resolved, run_dir, origin)]
        parts += ["## Recipe", _recipe(config, resolved)]
        parts += ["## Metrics", _metrics(rows, heldout, origin)]
    use = _use(name, layout, causal=model.config.causal)
    parts += ["## Use", f"```python\n{use}\n```", "## Limits", _LIMITS]
    return "\n\n".join(parts) + "\n"


_LIMITS = (
    "The figures above are all that was measured. The model was not tested for wrong, biased or "
    "harmful text, nor for text that repeats its training data, and it has no licence until whoever "
    "publishes it gives it one: add `license:` to the header."
)


def _use(path: str, layout: str, *, causal: bool) -> str:
    """The lines that load the model."""
    if layout == "onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{path}/model.onnx")\n'
            "# token and state in, logits and state out; state.npz holds the state before the text"
        )
    if layout == "hf":
        name = f"AutoModelFor{'CausalLM' if causal else 'MaskedLM'}"
        return (
            f"from transformers import {name}\n\n"
            f'model = {name}.from_pretrained("{path}", trust_remote_code=True)'
        )
    return f'from transnormer import load\n\nmodel = load("{path}")'


def _run_of(origin: Path) -> Path | None:
    """The run directory that a step lies in; None for any other directory."""
    run_dir = origin.parent.parent
    if origin.parent.name != CHECKPOINTS or not (run_dir / CONFIG).is_file():
        return None
    return run_dir if RESOLVED in read_json(run_dir / CONFIG) else None


def _step_of(origin: Path) -> int:
    return int(origin.name.rpartition("_")[2])


def _evaluations(run_dir: Path, origin: Path) -> list[dict[str, Any]]:
    """The evaluations up to the step whose weights these are."""
    rows = read_records(run_dir / EVALUATIONS)
    return [row for row in rows if row["step"] <= _step_of(origin)]


def _figures(row: dict[str, Any]) -> dict[str, float]:
    return {k: x for k, x in row.items() if isinstance(x, float) and k != "seconds"}


def _heldout(config: dict[str, Any]) -> str:
    """What the evaluations of a run are of."""
    given = config.get("data", {}).get("heldout")
    if isinstance(given, str):
        return f"held-out texts of {_shown(given)}"
    return "held-out part of the training data"


def _shown(text: str) -> str:
    """A text of a configuration; of a path of the machine only its end says anything to others."""
    return Path(text).name if Path(text).is_absolute() else text


def _header(name: str, task: str, rows: list[dict[str, Any]], heldout: str) -> str:
    """The YAML header; JSON strings are YAML's too."""
    lines = ["---", "library_name: transnormer", f"pipeline_tag: {task}"]
    lines += ["tags:", "- linear-attention", "- transnormer"]
    if rows:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task:"]
        lines += [f"      type: {task}", "    dataset:", "      type: held-out"]
        lines += [f"      name: {json.dumps(heldout)}", "    metrics:"]
        for key, value in _figures(rows[-1]).items():
            lines += [f"    - type: {key}", f"      value: {value!r}"]
    return "\n".join([*lines, "---"])


def _summary(model: Decoder) -> str:
    cost = ModelCost.of(model.config, model.head_weight.dtype)
    grows = cost.state_bytes_per_token
    state = f"a state of {cost.constant_state_bytes:,} bytes a sequence"
    if grows:
        state += f" and {grows:,} more for each token"
    elif model.config.causal:
        state += ", whatever the length of the text"
    else:
        state = "no state: it is bidirectional"
    return f"A language model of {cost.parameters:,} parameters with {state}."


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _model(model: Decoder, layout: str) -> str:
    config = model.config
    kinds = [block.token_mixer.kind for block in config.blocks]
    stored = "float32" if layout == "onnx" else str(model.head_weight.dtype).removeprefix("torch.")
    mixers = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return _table(
        {
            "parameters": f"{model.num_parameters():,}",
            "without embeddings": f"{model.num_parameters(embeddings=False):,}",
            "blocks": mixers,
            "model_dim": config.model_dim,
            "vocab_size": f"{config.vocab_size:,}",
            "stored as": stored,
            "fingerprint": f"`{model.fingerprint()[:16]}`",
        }
    )


def _data(config: dict[str, Any], resolved: dict[str, Any], run_dir: Path, origin: Path) -> str:
    data = config.get("data", {})
    paths = data.get("path", [])
    paths = [paths] if isinstance(paths, str) else paths
    named = ", ".join(f"`{_shown(x)}`" for x in paths)
    given = data.get("tokenizer")
    steps = [x for x in read_records(run_dir / METRICS) if x["step"] <= _step_of(origin)]
    read = [x["tokens"] for x in steps if "tokens" in x]
    tokens = resolved.get("training_tokens", [])
    return _table(
        {
            "corpus (`data.path`)": named or "unknown",
            "tokens of the corpus": ", ".join(f"{n:,}" for n in tokens) or "not counted",
            "tokens read": f"{read[-1]:,}" if read else "0",
            "sequence": f"{data['seq']:,} tokens" if "seq" in data else "unknown",
            "tokenizer": ("" if given is None else f"`{_shown(given)}`, ")
            + f"fingerprint `{str(resolved.get('tokenizer'))[:16]}`",
        }
    )


def _recipe(config: dict[str, Any], resolved: dict[str, Any]) -> str:
    lines = []
    for table, entries in config.items():
        # Where the run lay says nothing to others.
        if entries and table != "output":
            lines.append(f"[{table}]")
            lines += [f"{key} = {_toml(x)}" for key, x in entries.items() if x is not None]
    text = "\n".join(lines)
    where = f"on {resolved.get('device', 'an unknown device')} in {resolved.get('precision')}"
    return (
        f"Trained {where}, with every key of its run file but `output`; of absolute paths the last "
        f"part is given:\n\n```toml\n{text}\n```"
    )


def _toml(value: Any) -> str:
    """A value of a configuration on one line of TOML."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(x) for x in value)}]"
    return json.dumps(_shown(value) if isinstance(value, str) else value)


def _metrics(rows: list[dict[str, Any]], heldout: str, origin: Path) -> str:
    if not rows:
        return "The run made no evaluation up to this step."
    names = list(_figures(rows[-1]))
    shown = [rows[0], rows[-1]] if len(rows) > 1 else rows
    lines = [f"| step | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in shown:
        cells = (f"{row[name]:.4f}" if name in row else "" for name in names)
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    last = rows[-1]
    over = f" ({last['bytes']:,} bytes)" if "bytes" in last else ""
    text = f"On the {heldout}{over}, at its first and last evaluation:"
    if last["step"] < _step_of(origin):
        text += f" The weights are of step {_step_of(origin)}, after the last of them."
    return text + "\n\n" + "\n".join(lines)
