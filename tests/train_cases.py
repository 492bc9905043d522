"""A run so small that a step takes milliseconds, and what watches it."""

import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from transnormer.config import apply_overrides, validate
from transnormer.train import EvaluationReport, RunConfig, StepReport, run_training

# A run as a file, for what starts from the command line.
_RUN_FILE = """
[model]
model_dim = 32
num_layers = 2
heads = 2
glu_dim = 32
[data]
path = "{corpus}"
tokenizer = "bytes"
seq = 16
[train]
steps = 4
tokens_per_step = 64
save_every = 2
eval_every = {eval_every}
precision = "float32"
device = "cpu"
[output]
dir = "{output}"
"""


def run_file(*, corpus: str | Path = "corpus.txt", output: str | Path, eval_every: int = 0) -> str:
    """The TOML of a run of four steps and 20,000 parameters."""
    return _RUN_FILE.format(corpus=corpus, output=output, eval_every=eval_every)


WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
    "quietly",
]


def some_text(length: int = 4000) -> str:
    """A text of words in a fixed order without a short period."""
    words, number = [], 1
    while sum(map(len, words)) < length:
        number = number * 48271 % 2147483647
        words.append(WORDS[number % len(WORDS)])
    return " ".join(words)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the kernel refuse to write any file beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Notes:
    """A Progress that keeps everything."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[StepReport] = []
        self.evaluations: list[EvaluationReport] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, report: StepReport, steps: int) -> None:
        self.steps.append(report)

    def evaluation(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)


class Crash(Exception):
    """What stands for a death in the tests that need no real one."""


class CrashAt(Notes):
    """A Progress that ends the run at a step without any farewell."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, report: StepReport, steps: int) -> None:
        super().step(report, steps)
        if report.step == self.at:
            raise Crash


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Every tensor file of two steps holds the same bits."""
    names = [sorted(p.relative_to(x) for p in x.rglob("*.safetensors")) for x in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


class Found(NamedTuple):
    """What the stand-in for an evaluation returns."""

    tokens: int
    bytes: int
    nats_per_token: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)


def constant_evaluation(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """An evaluation that costs nothing; it must find the model in eval mode."""
    assert not model.training
    size = sum(len(text.encode()) for text in texts)
    return Found(size, size, 2.0)


def tiny_run(folder: Path, *overrides: str) -> RunConfig:
    """A run in folder/run on a text in folder; overrides as on the command line."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        corpus.write_text(some_text())
    data = {
        "model": {"model_dim": 32, "num_layers": 2, "heads": 2, "glu_dim": 32, "dropout": 0.1},
        "data": {"path": str(corpus), "seq": 16},
        "train": {"steps": 6, "tokens_per_step": 64, "precision": "float32", "device": "cpu"},
        "optimizer": {"lr": 1e-2, "warmup": 2},
        "output": {"dir": str(folder / "run")},
    }
    return validate(RunConfig, apply_overrides(data, overrides), source="test")


def train_once(config: RunConfig) -> None:
    """Continue a run on one thread: what a process of its own does."""
    torch.set_num_threads(1)
    run_training(config, resume=True)
