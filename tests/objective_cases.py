"""Runs of every objective that several processes train, and the files that they read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_cases import tiny_run

from transnormer import save
from transnormer.data import ByteTokenizer
from transnormer.eval.perplexity import score_texts
from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.train import OneProcess, RunConfig, run_training
from transnormer.train.adapter_layout import AdapterLayout

PLAIN = ("model.dropout=0.0", "optimizer.schedule=constant", "train.eval_every=2")
COLOURS = {"grass": "green", "sky": "blue", "snow": "white", "coal": "black", "blood": "red"}


def labelled_lines() -> list[dict[str, Any]]:
    """Texts of different lengths whose class is the word that they hold somewhere."""
    rows = []
    for number in range(40):
        word = "hot" if number % 5 < 3 else "icy"
        rows.append({"text": f"{'so ' * (number % 4)}{number} it is {word} today", "label": word})
    return rows


def conversations() -> list[dict[str, Any]]:
    """A conversation of two turns for each thing, and plain lines."""
    rows: list[dict[str, Any]] = []
    for thing, colour in COLOURS.items():
        turns = [("user", thing), ("assistant", colour), ("user", "sure?"), ("assistant", "yes")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        rows.append({"instruction": f"{thing}!", "output": colour})
    return rows


def saved_model(folder: Path) -> Path:
    """A model of bytes to begin from, with its tokenizer; made once."""
    path = folder / "base"
    if not path.exists():
        torch.manual_seed(0)
        special = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
        sizes = {"model_dim": 32, "num_layers": 2, "heads": 2, "glu_dim": 32}
        save(Decoder(zoo.tnl_custom(vocab_size=259, **sizes).model_copy(update=special)), path)
        ByteTokenizer().save(path)
    return path


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(folder: Path, kind: str, name: str, *overrides: str) -> RunConfig:
    """A run of an objective in folder/name; "lora" is an instruction run with adapters."""
    given: list[str] = [*PLAIN, f"output.dir={folder / name}"]
    if kind == "causal":
        given += ["train.eval_bytes=200"]
    elif kind == "masked":
        given += ["objective.kind=masked", "model.causal=false", "train.eval_bytes=200"]
    elif kind == "classification":
        path = _write(folder / "labelled.jsonl", labelled_lines())
        given += ["objective.kind=classification", "model.causal=false", "objective.dropout=0.0"]
        given += ["data.seq=24", f"data.path={path}", "data.heldout=0.25"]
        given += ["train.tokens_per_step=192"]
    else:
        path = _write(folder / "lines.jsonl", conversations())
        given += [f"model={{init_from='{saved_model(folder)}',dropout=0.0}}"]
        given += ["objective.kind=instruction", f"data.path={path}", "data.heldout=0.2"]
        given += ["data.seq=64", "train.tokens_per_step=256"]
        given += ["lora.rank=4"] if kind == "lora" else []
    return tiny_run(folder, *given, *overrides)


class DoubleLayout(Layout):
    """A layout of a model in float64, where an order of sums shows in the last digits alone."""

    def wrap(self, model: Any, values: Any = None) -> Any:
        return super().wrap(model.double(), values)


class DoubleProcess(OneProcess):
    """One process with a model in float64."""

    def wrap(self, model: Any, values: Any = None) -> Any:
        return model.double()


class DoubleAdapterLayout(AdapterLayout):
    """The same of a model with adapters."""

    def wrap(self, model: Any, values: Any = None) -> Any:
        return super().wrap(model.double(), values)


def run_in_float64(
    group: dist.ProcessGroup | None, config: RunConfig, axes: Axes, resume: bool
) -> int:
    """A whole run, or what is left of it, on all ranks of a group or on one process; its steps."""
    kind = DoubleLayout if config.lora is None else DoubleAdapterLayout
    sync = DoubleProcess() if group is None else kind(axes, torch.device("cpu"))
    return run_training(config, resume=resume, sync=sync).step


def first_scores(group: dist.ProcessGroup | None, config: RunConfig) -> float:
    """What a run whose parameters are gathered in bfloat16 evaluates before its first step."""
    sync: Any = OneProcess()
    if group is not None:
        axes = Axes(dp_shard=dist.get_world_size(group))
        sync = Layout(axes, torch.device("cpu"), gather_dtype=torch.bfloat16)
    result = run_training(config, evaluate=score_texts, sync=sync)
    assert result.first is not None
    return result.first.headline().value
