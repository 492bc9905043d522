"""The project's own models as scorers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from clean_cases import grammar, shuffled

from transnormer.clean.selfclean import model
from transnormer.clean.selfclean.model import ModelScorer
from transnormer.eval.perplexity import Score, score_tokens

RUN = """
[model]
model_dim = 64
num_layers = 2
heads = 2
glu_dim = 96
[data]
path = "embedded"
tokenizer = "bytes"
seq = 128
[train]
steps = 150
tokens_per_step = 1024
seed = 0
eval_every = 0
save_every = 0
[optimizer]
name = "adamw"
lr = 3e-3
schedule = "constant"
[output]
dir = "unused"
"""


@pytest.mark.slow
def test_a_trained_model_tells_shuffled_words_from_text(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    scorer = ModelScorer(run, tmp_path / "model").fit(grammar(n) for n in range(150))
    good = scorer.score([grammar(n) for n in range(200, 212)])
    bad = scorer.score([shuffled(grammar(n), n) for n in range(200, 212)])
    assert max(s.bits_per_byte for s in good) < min(s.bits_per_byte for s in bad)
    assert scorer.score(["", "text"])[0] == (0.0, 0.0)
    # A second call finds the run and trains no more.
    again = ModelScorer(run, tmp_path / "model").fit(grammar(n) for n in range(150))
    assert again.score([grammar(200)]) == scorer.score([grammar(200)])


@pytest.mark.parametrize("vocab_size", [259, 8192, 65536, 262144])
def test_a_batch_on_a_gpu_has_bounded_logits(vocab_size: int) -> None:
    reading = model._wide(vocab_size)
    assert reading.chunk is not None
    tokens = reading.rows * reading.chunk
    assert tokens >= reading.near_rows * 16
    assert tokens * vocab_size <= max(2**28, 8 * 256 * vocab_size)
    assert tokens >= 8 * 256


def test_a_model_scores_in_the_precision_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, bool]] = []

    def watched(*arguments: Any, **options: Any) -> list[Score]:
        found.append((precision, torch.is_autocast_enabled("cpu")))
        return score_tokens(*arguments, **options)

    monkeypatch.setattr(model, "score_tokens", watched)
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    for precision in ("float32", "bfloat16"):
        settings = ["train.steps=1", f'train.precision="{precision}"']
        scorer = ModelScorer(run, tmp_path / precision, settings)
        scorer.fit(grammar(n) for n in range(20)).score([grammar(30)])
    assert found == 2 * [("float32", False)] + 2 * [("bfloat16", True)]
