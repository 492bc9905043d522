"""A model trained by the project's own trainer as the scorer: the paper's evaluation model."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from transnormer.clean.selfclean.ngram import Scores
from transnormer.data.tokenizers import load_tokenizer
from transnormer.eval.perplexity import score_tokens
from transnormer.infer.text import begin_id
from transnormer.models import checkpoint
from transnormer.train.recipe import read_run
from transnormer.train.trainer import run_training

# Tokens of the pieces whose context is cut off, and tokens of a text that are scored.
_NEAR, _MOST = 16, 4096


class _Reading(NamedTuple):
    """How much is read at once: rows of whole texts, their chunk, and rows of pieces."""

    rows: int
    chunk: int | None
    near_rows: int


# A small model on a GPU waits for its launches unless it reads much at a time.
_NARROW, _WIDE = _Reading(8, None, 64), _Reading(64, 256, 1024)


class ModelScorer:
    """Trains a run's model on the texts, and scores with it.

    The gain of context is what a token costs less when it sees all of its document and not only
    the piece of 16 tokens that it stands in, in bits a byte.
    """

    def __init__(self, run: Path, directory: Path, settings: Sequence[str] = ()) -> None:
        """run: TOML of a training run; directory: for the texts and the run; settings: key=value."""
        self._run, self._directory, self._settings = run, directory, settings

    def fit(self, texts: Iterable[str]) -> "ModelScorer":
        """Train; a run that was interrupted goes on."""
        self._directory.mkdir(parents=True, exist_ok=True)
        corpus, target = self._directory / "texts.jsonl", self._directory / "run"
        with corpus.open("w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}) + "\n")
        places = [f'data.path="{corpus}"', f'output.dir="{target}"']
        config = read_run(self._run, [*self._settings, *places])
        result = run_training(config, resume=target.exists())
        corpus.unlink()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = checkpoint.load(result.checkpoint, device=device)
        self._reading = _WIDE if device == "cuda" else _NARROW
        file = checkpoint.find_tokenizer(result.checkpoint)
        if file is None:
            raise ValueError(f"{result.checkpoint} has no tokenizer; expected one beside the model")
        self._tokenizer = load_tokenizer(file)
        return self

    def score(self, texts: Sequence[str]) -> list[Scores]:
        """Score texts side by side; an empty one has no bits."""
        wanted = [number for number, text in enumerate(texts) if text]
        ids = [found[:_MOST] for found in self._tokenizer.encode_batch([texts[n] for n in wanted])]
        first = begin_id(self._model, self._tokenizer)
        rows, chunk, near_rows = self._reading
        whole = score_tokens(self._model, ids, first_id=first, rows=rows, chunk=chunk)
        pieces = [[row[at : at + _NEAR] for at in range(0, len(row), _NEAR)] for row in ids]
        flat = [piece for row in pieces for piece in row]
        near = iter(score_tokens(self._model, flat, first_id=first, rows=near_rows))
        result = [Scores(0.0, 0.0)] * len(texts)
        for number, row, full, cut in zip(wanted, ids, whole, pieces, strict=True):
            scored = self._tokenizer.decode(row)
            size = max(1, len(scored.encode("utf-8", "surrogatepass")))
            bits = full.nats / math.log(2) / size
            short = sum(next(near).nats for _ in cut) / math.log(2) / size
            result[number] = Scores(bits, short - bits)
        return result
