"""A model trained by the project's own trainer as the scorer: the paper's evaluation model."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from transnormer.clean.selfclean.ngram import Scores
from transnormer.data.tokenizers import load_tokenizer
from transnormer.eval.perplexity import score_tokens
from transnormer.infer.text import begin_id
from transnormer.models import checkpoint
from transnormer.train.metrics import Progress
from transnormer.train.precision import autocast_for, choose_device, choose_precision
from transnormer.train.recipe import read_run
from transnormer.train.trainer import run_training

# Tokens of the pieces whose context is cut off, and tokens of a text that are scored.
_NEAR, _MOST = 16, 4096


class _Reading(NamedTuple):
    """How much is read at once: rows of whole texts, their chunk, and rows of pieces."""

    rows: int
    chunk: int | None
    near_rows: int


# A small model on a GPU waits for its launches unless it reads much at a time: as many rows as have
# so many logits.
_NARROW = _Reading(8, None, 64)
_CHUNK, _WIDE_LOGITS, _WIDE_ROWS = 256, 2**28, 128


def _wide(vocab_size: int) -> _Reading:
    rows = max(_NARROW.rows, min(_WIDE_ROWS, _WIDE_LOGITS // (_CHUNK * vocab_size)))
    # Half of the tokens: pieces are many rows, and each has a state in every layer.
    return _Reading(rows, _CHUNK, rows * _CHUNK // (2 * _NEAR))


class ModelScorer:
    """Trains a run's model on the texts, and scores with it.

    The gain of context is what a token costs less when it sees all of its document and not only
    the piece of 16 tokens that it stands in, in bits a byte. The model scores on the device and in
    the precision of its training: under bfloat16 the bits are good to about three digits.
    """

    def __init__(
        self,
        run: Path,
        directory: Path,
        settings: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """Nothing is trained yet.

        Args:
            run: TOML of a training run.
            directory: for the texts and the run.
            settings: key=value, over the run's.
            progress: is told of the training.
        """
        self._run, self._directory, self._settings = run, directory, settings
        self._progress = progress

    def fit(self, texts: Iterable[str]) -> "ModelScorer":
        """Train; a run that was interrupted goes on."""
        self._directory.mkdir(parents=True, exist_ok=True)
        corpus, target = self._directory / "texts.jsonl", self._directory / "run"
        with corpus.open("w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}) + "\n")
        places = [f'data.path="{corpus}"', f'output.dir="{target}"']
        config = read_run(self._run, [*self._settings, *places])
        result = run_training(config, resume=target.exists(), progress=self._progress)
        corpus.unlink()
        self._device = choose_device(config.train.device)
        self._precision = choose_precision(config.train.precision, self._device)
        self._model = checkpoint.load(result.checkpoint, device=self._device)
        gpu = self._device.type == "cuda"
        self._reading = _wide(self._model.config.vocab_size) if gpu else _NARROW
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
        pieces = [[row[at : at + _NEAR] for at in range(0, len(row), _NEAR)] for row in ids]
        flat = [piece for row in pieces for piece in row]
        # One context for both: what it casts of the weights is cast once.
        with autocast_for(self._precision, self._device) or nullcontext():
            whole = score_tokens(self._model, ids, first_id=first, rows=rows, chunk=chunk)
            near = iter(score_tokens(self._model, flat, first_id=first, rows=near_rows))
        result = [Scores(0.0, 0.0)] * len(texts)
        for number, row, full, cut in zip(wanted, ids, whole, pieces, strict=True):
            scored = self._tokenizer.decode(row)
            size = max(1, len(scored.encode("utf-8", "surrogatepass")))
            bits = full.nats / math.log(2) / size
            short = sum(next(near).nats for _ in cut) / math.log(2) / size
            result[number] = Scores(bits, short - bits)
        return result
