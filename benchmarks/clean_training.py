"""Claim: a model trained on the cleaned corpus models held-out text better than one on the raw corpus.

The raw corpus is the head of DATA/en_train.jsonl.xz with the whole dirty slice mixed in, a fifth of
its bytes; the cleaned one is what `transnormer clean` makes of it with the defaults. The same model
is trained on each with each seed for the same tokens, with one tokenizer (trained on the raw
corpus), and scores the head of DATA/en_val.jsonl.xz in bits per byte. Two runs of a seed are a pair.

    python benchmarks/clean_training.py DATA --pack carry/clean     on a machine that can clean
    python benchmarks/clean_training.py carry/clean --run recipes/scorer_tnl.toml --minutes 6
    python benchmarks/clean_training.py DATA --toy                  minutes on a CPU

--pack writes a folder of text that needs nothing but the trainer afterwards, and that
clean_scorer.py takes as DATA too. Rows are written as they finish; no run begins that would not end
within --minutes. Writes benchmarks/results/clean_training.json; the last line is JSON.
"""

import argparse
import json
import lzma
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
from clean_scorer import DOCUMENTS, ENGLISH, LABELS, read

from transnormer.data.tokenizers import train_bpe
from transnormer.eval.perplexity import score_texts
from transnormer.train.recipe import read_run
from transnormer.train.trainer import run_training

ARMS = ("raw", "cleaned")
HELDOUT, CLEANED = "en_val.jsonl.xz", "cleaned.jsonl.xz"
RECIPES = Path(__file__).parents[1] / "recipes"
TOY = (
    "model.model_dim=128",
    "model.num_layers=3",
    "model.glu_dim=256",
    "train.steps=400",
    # The recipe's own limit would make tokens unequal.
    "train.max_minutes=600",
)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write lines of JSON, .xz or plain."""
    with lzma.open(path, "wb") if path.suffix == ".xz" else path.open("wb") as stream:
        stream.writelines(json.dumps(record).encode() + b"\n" for record in records)
    return path


def head_of(path: Path, megabytes: float) -> list[dict[str, Any]]:
    """The first records of a file, of about so many megabytes of text."""
    records, size = [], 0
    for record in read(path):
        records.append(record)
        size += len(record["text"].encode())
        if size >= megabytes * 1e6:
            break
    return records


def raw_corpus(data: Path, dirty: float, part: float) -> list[dict[str, Any]]:
    """Text and id of part of the English documents and of the dirty slice, the share `dirty`."""
    slice_ = list(read(data / DOCUMENTS))
    size = sum(len(record["text"].encode()) for record in slice_) / 1e6
    records = [*head_of(data / ENGLISH, size * (1 - dirty) / dirty), *slice_]
    random.Random(1).shuffle(records)
    return [
        {"id": record["id"], "text": record["text"]}
        for record in records[: round(part * len(records))]
    ]


def clean(records: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """What the defaults of `transnormer clean` leave of a corpus."""
    # Here, since a machine that only trains needs none of what cleaning needs.
    from transnormer.clean.config import make_clean_config
    from transnormer.clean.pipeline import clean_corpus

    source = write_lines(work / "raw_to_clean.jsonl", records)
    tables = {"input": {"path": str(source)}, "output": {"dir": str(work / "cleaning")}}
    clean_corpus(make_clean_config({**tables, "executor": {"workers": 1}}))
    found = [r for path in sorted((work / "cleaning" / "clean").iterdir()) for r in read(path)]
    shutil.rmtree(work / "cleaning")
    return [{"id": record["id"], "text": record["text"]} for record in found]


def pack(data: Path, target: Path, work: Path, dirty: float, megabytes: float) -> None:
    """Write the folder that another machine trains from, and the scorer's texts."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (DOCUMENTS, LABELS):
        shutil.copyfile(data / name, target / name)
    write_lines(target / ENGLISH, head_of(data / ENGLISH, megabytes))
    write_lines(target / HELDOUT, head_of(data / HELDOUT, 1))
    write_lines(target / CLEANED, clean(raw_corpus(data, dirty, 1.0), work))
    for path in sorted(target.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")


class Comparison:
    """The two corpora on disk with their tokenizer, and the runs on them."""

    def __init__(self, data: Path, work: Path, arguments: argparse.Namespace) -> None:
        self._work, self._run, self._settings = work, arguments.run, arguments.settings
        raw = raw_corpus(data, arguments.dirty, arguments.part)
        if (data / CLEANED).is_file():
            cleaned = list(read(data / CLEANED))
            cleaned = cleaned[: round(arguments.part * len(cleaned))]
        else:
            cleaned = clean(raw, work)
        texts = {"raw": raw, "cleaned": cleaned}
        self.facts = {
            arm: {
                "documents": len(found),
                "megabytes": sum(len(record["text"].encode()) for record in found) / 1e6,
            }
            for arm, found in texts.items()
        }
        self._paths = {arm: write_lines(work / f"{arm}.jsonl", texts[arm]) for arm in ARMS}
        self._heldout = write_lines(work / "heldout.jsonl", head_of(data / HELDOUT, 1))
        tokenizer = train_bpe((record["text"] for record in raw), arguments.vocab)
        (work / "tokenizer").mkdir()
        tokenizer.save(work / "tokenizer")

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train once; returns the row."""
        target = self._work / f"{arm}_{seed}"
        settings = [
            "train.eval_bytes=0",
            *self._settings,
            f'data.path="{self._paths[arm]}"',
            f'data.heldout="{self._heldout}"',
            f'data.tokenizer="{self._work / "tokenizer"}"',
            f'output.dir="{target}"',
            f"train.seed={seed}",
            "train.eval_every=0",
            "train.save_every=0",
        ]
        config = read_run(self._run, settings)
        start = time.perf_counter()
        result = run_training(config, evaluate=score_texts)
        shutil.rmtree(target)
        if result.last is None or result.stopped_by != "steps":
            raise RuntimeError(
                f"{arm}, seed {seed}: stopped by {result.stopped_by}; expected every step and an "
                "evaluation: pairs compare equal tokens"
            )
        return {
            "arm": arm,
            "seed": seed,
            "tokens": result.step * config.train.tokens_per_step,
            "bits_per_byte": result.last.headline().value,
            "seconds": time.perf_counter() - start,
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of the pairs that are whole, cleaned less raw, in bits per byte and per cent."""
    found = {(row["arm"], row["seed"]): row["bits_per_byte"] for row in rows}
    pairs = [
        {"seed": seed, "raw": value, "cleaned": found["cleaned", seed]}
        for (arm, seed), value in found.items()
        if arm == "raw" and ("cleaned", seed) in found
    ]
    differences = [pair["cleaned"] - pair["raw"] for pair in pairs]
    shares = [100 * (pair["cleaned"] / pair["raw"] - 1) for pair in pairs]
    deviation = statistics.stdev(differences) if len(differences) > 1 else None
    return {
        "pairs": pairs,
        "mean_difference": statistics.fmean(differences) if differences else None,
        "standard_deviation": deviation,
        "mean_percent": statistics.fmean(shares) if shares else None,
        "lower_in": sum(difference < 0 for difference in differences),
    }


def main() -> None:
    """Pack, or train every pair and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "data", type=Path, help="directory of the corpora, or one that --pack wrote"
    )
    parser.add_argument("--pack", type=Path, help="write this folder, and train nothing")
    parser.add_argument("--megabytes", type=float, default=60, help="of English in the folder")
    parser.add_argument("--dirty", type=float, default=0.2, help="the slice's share of the bytes")
    parser.add_argument("--run", type=Path, default=RECIPES / "scorer_tnl.toml")
    parser.add_argument("--toy", action="store_true", help="recipes/quickstart.toml, smaller")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of the BPE")
    parser.add_argument("--part", type=float, default=1.0, help="share of the mixture that is used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--commit", help="of this checkout, where git cannot tell it")
    output = harness.RESULTS / "clean_training.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.toy:
        arguments.run = RECIPES / "quickstart.toml"
        arguments.settings = [*TOY, *arguments.settings]
        arguments.vocab, arguments.part = min(arguments.vocab, 2048), min(arguments.part, 0.2)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if arguments.pack:
            pack(arguments.data, arguments.pack, work, arguments.dirty, arguments.megabytes)
            return
        environment = harness.gpu_environment(arguments.commit)
        comparison = Comparison(arguments.data, work, arguments)
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {"environment": environment, "recipe": arguments.run.stem}
        result |= {"settings": arguments.settings, "corpora": comparison.facts}
        longest = 0.0
        for seed in arguments.seeds:
            for arm in ARMS:
                left = 60 * arguments.minutes - (time.perf_counter() - start)
                if longest > left:
                    print(f"{arm}, seed {seed}: not begun, {left:.0f} s are left of the budget")
                    continue
                rows.append(comparison.train(arm, seed))
                longest = max(longest, rows[-1]["seconds"])
                result |= {"rows": rows, "summary": summary(rows)}
                harness.publish(result, arguments.output, ("summary",))
    table = [
        (row["seed"], row["arm"], row["tokens"], f"{row['bits_per_byte']:.4f}") for row in rows
    ]
    harness.print_table(("seed", "corpus", "tokens", "held-out bits per byte"), table)
    harness.publish(result, arguments.output)


if __name__ == "__main__":
    main()
