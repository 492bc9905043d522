"""Claim: weight-only int8 costs no bits per byte, and GPTQ takes back half of what int4 costs.

Scores held-out texts with a trained model in its own dtype, with 8-bit weights, and with 4-bit
weights in groups, rounded to the nearest and calibrated on training texts. The texts are those that
ship with Python (``path = "embedded"`` of a run), or two files. Prints a table; the last line is
JSON, which also goes to benchmarks/results/quantize.json.

    python benchmarks/quantize.py runs/quickstart
    python benchmarks/quantize.py CKPT --calibration train.txt --text heldout.txt --device cuda
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from transnormer.data import read_documents
from transnormer.data.embedded import embedded_documents
from transnormer.data.tokenizers import Tokenizer, load_tokenizer
from transnormer.eval.perplexity import score_texts
from transnormer.infer.quantize import quantize
from transnormer.models.checkpoint import find_tokenizer, load


def texts_of(path: str | None, split: Any, most: int) -> list[str]:
    """The first documents of a file, or of a split of the embedded texts, up to a size."""
    documents = embedded_documents(split) if path is None else read_documents(path, name=path)
    chosen, size = [], 0
    for document in documents:
        if size >= most:
            break
        chosen.append(document.text)
        size += len(document.text.encode())
    return chosen


def batches_of(tokenizer: Tokenizer, texts: list[str], rows: int, seq: int) -> list[Tensor]:
    """Rows of ``seq`` tokens of the texts one after the other."""
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    whole = ids[: len(ids) // seq * seq].view(-1, seq)
    return list(whole[:rows].split(4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    parser.add_argument("--bytes", type=int, default=65_536, help="of the held-out text")
    parser.add_argument("--rows", type=int, default=64, help="of calibration texts")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "quantize.json")
    options = parser.parse_args()
    found = find_tokenizer(options.checkpoint)
    if found is None:
        raise SystemExit(f"{options.checkpoint} has no tokenizer beside it")
    tokenizer = load_tokenizer(found)
    heldout = texts_of(options.text, "heldout", options.bytes)
    batches = batches_of(
        tokenizer, texts_of(options.calibration, "train", 10**7), options.rows, options.seq
    )
    group: dict[str, Any] = {"group_size": options.group_size}
    kinds: dict[str, dict[str, Any] | None] = {
        "bfloat16": None,
        "int8": {"bits": 8},
        "int4, nearest": {"bits": 4, **group},
        "int4, GPTQ": {"bits": 4, "calibration": batches, **group},
    }
    rows = []
    for name, settings in kinds.items():
        model = load(options.checkpoint, device=options.device, dtype=torch.bfloat16)
        if settings is not None:
            quantize(model, **settings)
        score = score_texts(model, tokenizer, heldout)
        rows.append({"weights": name, "bits_per_byte": score.bits_per_byte, "bytes": score.bytes})
    harness.print_table(
        ("weights", "bits per byte"),
        [(row["weights"], f"{row['bits_per_byte']:.4f}") for row in rows],
    )
    result = {
        "benchmark": "quantize",
        "environment": harness.gpu_environment(options.commit),
        "checkpoint": options.checkpoint,
        "group_size": options.group_size,
        "calibration_tokens": sum(batch.numel() for batch in batches),
        "rows": rows,
    }
    harness.publish(result, options.output)


if __name__ == "__main__":
    main()
