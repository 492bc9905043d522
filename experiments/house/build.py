"""Make the house model: tokens, training, and the checkpoint that other work starts from.

    python experiments/house/build.py all --data FOLDER

FOLDER holds en_train, en_val, zh_train and zh_val as .jsonl, .jsonl.xz or the like. The parts can be
made one by one, on different machines: ``tokens``, then ``train``, then ``export``.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from transnormer.data.prepare import TOKENIZER, tokenize_corpus, train_tokenizer
from transnormer.data.tokenizers import load_tokenizer
from transnormer.eval.perplexity import score_texts
from transnormer.files import atomic_directory
from transnormer.models import checkpoint
from transnormer.train import Quiet, StepReport, read_run, run_training
from transnormer.train.metrics import EVALUATIONS, METRICS

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tnl_30m.toml"
VOCAB_SIZE, COMMON_CHARACTERS = 32_768, 3755
# The tokenizer reads the first 100 million characters: the smaller language comes first.
PARTS = ("zh_train", "en_train")
HELDOUT = ("zh_val", "en_val")
# Of one file, its header included, for places that take 16 MiB at most.
FILE_BYTES = 16 * 2**20 - 2**16
_TELL_EVERY = 200


class Lines(Quiet):
    """A line every so many steps."""

    def message(self, text: str) -> None:
        print(text, flush=True)

    def step(self, report: StepReport, steps: int) -> None:
        if report.step % _TELL_EVERY == 0 or report.step == steps:
            print(
                f"step {report.step} of {steps}: loss {report.loss:.4f}, "
                f"{report.tokens_per_second:,.0f} tokens/s, {report.seconds:.0f} s",
                flush=True,
            )


def make_tokens(data: Path, tokens: Path) -> dict[str, Any]:
    """Train the tokenizer and encode both languages, held-out files apart."""
    with TemporaryDirectory() as folder:
        for number, name in enumerate((*PARTS, *HELDOUT)):
            found = sorted(data.glob(f"{name}.jsonl*"))
            if len(found) != 1:
                raise FileNotFoundError(
                    f"{data} holds {len(found)} files {name}.jsonl*; expected one; check --data"
                )
            # Files are read in the order of their names.
            kind = "heldout" if name in HELDOUT else "train"
            target = Path(folder) / kind / f"{number}_{found[0].name}"
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(found[0].resolve())
        text, heldout = f"{folder}/train", f"{folder}/heldout"
        trained = Path(folder) / TOKENIZER
        train_tokenizer(text, VOCAB_SIZE, trained, heldout=heldout, han=COMMON_CHARACTERS)
        made = tokenize_corpus(text, str(trained), tokens, heldout=heldout)
    return {"training_tokens": made.train.num_tokens, "bytes": made.train.num_bytes}


def train(tokens: Path, run: Path, settings: list[str]) -> dict[str, Any]:
    """Train as the recipe says; a run that was interrupted goes on."""
    own = [f"data.path={json.dumps(str(tokens))}", f"output.dir={json.dumps(str(run))}"]
    config = read_run(RECIPE, [*own, *settings])
    made = run_training(config, resume=run.exists(), evaluate=score_texts, progress=Lines())
    last = None if made.last is None else made.last._asdict()
    return {"step": made.step, "train_seconds": made.seconds, "heldout": last}


def export(run: Path, target: Path) -> dict[str, Any]:
    """The trained weights in bfloat16, in files of at most 16 MiB, with tokenizer and metrics."""
    model = checkpoint.load(run, dtype=torch.bfloat16)
    tokenizer_file = checkpoint.find_tokenizer(run)
    assert tokenizer_file is not None
    tokenizer = load_tokenizer(tokenizer_file)
    if (target / RECIPE.name).is_file():
        # An earlier export; any other directory that holds something is refused.
        shutil.rmtree(target)
    with atomic_directory(target) as directory:
        checkpoint.write_weights(
            model,
            directory,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shard_bytes=FILE_BYTES,
        )
        tokenizer.save(directory)
        for name in (METRICS, EVALUATIONS):
            shutil.copy(run / name, directory / name)
        shutil.copy(RECIPE, directory / RECIPE.name)
    sizes = [file.stat().st_size for file in sorted(target.iterdir())]
    return {
        "files": len(sizes),
        "largest_mib": max(sizes) / 2**20,
        "parameters": model.num_parameters(),
        "without_embedding": model.num_parameters(embeddings=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["all", "tokens", "train", "export"])
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="the four files of text")
    parser.add_argument("--tokens", type=Path, default=ROOT / "artifacts" / "house-tokens")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "tnl-30m")
    parser.add_argument("--output", type=Path, default=ROOT / "artifacts" / "tnl-30m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    began, found = time.monotonic(), {}
    if options.part in ("all", "tokens") and not (
        options.part == "all" and options.tokens.exists()
    ):
        found |= make_tokens(options.data, options.tokens)
    if options.part in ("all", "train"):
        found |= train(options.tokens, options.run, options.settings)
    if options.part in ("all", "export"):
        found |= export(options.run, options.output)
    print(json.dumps({"house": options.part, **found, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
