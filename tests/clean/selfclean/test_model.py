"""The project's own models as scorers."""

from pathlib import Path

import pytest
from clean_cases import grammar, shuffled

from transnormer.clean.selfclean.model import ModelScorer

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
