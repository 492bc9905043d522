"""Claim: what corpus cleaning finds, spares and costs, against the labels of a dirty slice.

Cleans the slice (DATA/dirty_docs.jsonl.xz, labels beside it) with the default configuration and
compares every document with its label, on each half of the documents: thresholds were set on the
half "tuned", the claim is about the half "held". Then cleans part of DATA/en_train.jsonl.xz as plain
lines: throughput with two workers, peak memory of one at two sizes. Last, one round of self-cleaning
with the n-gram scorer on English and those documents of the slice that only a model can tell. Prints
tables; the last line is JSON, which also goes to benchmarks/results/clean_cpu.json.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import harness
from clean_scorer import DOCUMENTS, ENGLISH, LABELS, print_told, read, separation

from transnormer.clean.config import make_clean_config
from transnormer.clean.pipeline import clean_corpus
from transnormer.clean.words import jaccard, shingle_set

HALVES = ("tuned", "held")
# Of the characters that a defect added so many may stay, and of the text so many may be lost: bare
# addresses are removed by rule, also from text that is labelled clean.
LEFT, LOST = 0.1, 0.05
# A process of its own, so that its workers import what cleaning needs and no more.
RUN = """
import json, sys, time
from transnormer.clean.config import make_clean_config
from transnormer.clean.pipeline import clean_corpus
source, target, workers, part_bytes = sys.argv[1:]
stages = {}
start = time.perf_counter()
report = clean_corpus(
    make_clean_config({"input": {"path": source, "part_bytes": int(part_bytes)},
                       "output": {"dir": target}, "executor": {"workers": int(workers)}}),
    progress=lambda stage, done, tasks: stages.update({stage: time.perf_counter() - start}),
)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "ended": stages, "peak_kib": int(peak),
                  "cpu": report["task_cpu_seconds"], "documents": report["documents"]["read"]}))
"""


def half(name: str) -> str:
    """Which half a document is in: by its id, so that it never changes."""
    return HALVES[int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2]


def common(a: str, b: str) -> int:
    """Length of the longest common subsequence, in bits of one integer (Hyyro 2004)."""
    places: dict[str, int] = defaultdict(int)
    for place, char in enumerate(a):
        places[char] |= 1 << place
    full = (1 << len(a)) - 1
    row = full
    for char in b:
        matched = row & places.get(char, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def f1(a: str, b: str) -> float:
    """Character F1: twice what they have in common by what both have."""
    return 2 * common(a, b) / max(1, len(a) + len(b))


class Slice:
    """The dirty slice beside what became of it."""

    def __init__(self, data: Path, output: Path) -> None:
        self.raw = {record["id"]: record["text"] for record in read(data / DOCUMENTS)}
        self.labels = {record["id"]: record for record in read(data / LABELS)}
        self.kept = {r["id"]: r for path in (output / "clean").iterdir() for r in read(path)}
        self.dropped = {r["id"]: r for path in (output / "dropped").iterdir() for r in read(path)}

    def names(self, part: str) -> list[str]:
        """The ids of a half."""
        return [name for name in self.raw if half(name) == part]

    def is_copy(self, name: str) -> bool:
        """Whether it was dropped since another one stays in its place."""
        return self.dropped.get(name, {}).get("step") == "duplicates"

    def cleaned(self, name: str) -> bool:
        """Whether the defect is gone and the text is not."""
        if name not in self.kept:
            return False
        label, text, raw = self.labels[name], self.kept[name]["text"], self.raw[name]
        if label["label"] == "pii":
            found = {tuple(span[:2]) for span in self.kept[name]["pii"]}
            return all(tuple(span[:2]) in found for span in label["pii_spans"])
        if "numbers" in label:
            return all(
                text.count(variant) < raw.count(variant) and plain in text
                for variant, plain in label["numbers"]
                if variant != plain
            )
        clean = label["clean_text"].strip()
        shared, before = common(text, clean), common(raw, clean)
        left = len(text) - shared <= LEFT * (len(raw) - before) + 1
        return left and len(clean) - shared <= LOST * len(clean)


def judge(found: Slice, part: str) -> dict[str, Any]:
    """Every figure of one half."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    wrong, clean, f1s = [], 0, []
    kept_parts, parts = 0, 0
    for name in found.names(part):
        label = found.labels[name]
        kind, expected = label["label"], label["expected"]
        if kind in ("near_dup", "exact_dup") or label.get("needs_model"):
            continue
        if expected == "keep":
            clean += 1
            if name in found.dropped and not found.is_copy(name):
                wrong.append(name)
        elif expected in ("drop", "clean", "clean_or_drop") and not found.is_copy(name):
            good = (name in found.dropped and expected != "clean") or (
                expected != "drop" and found.cleaned(name)
            )
            kinds[kind]["found" if good else "missed"] += 1
        if "clean_text" in label and kind != "pii" and name in found.kept:
            f1s.append(f1(found.kept[name]["text"], label["clean_text"].strip()))
        for piece in label.get("must_preserve", ()):
            parts += 1
            kept_parts += name in found.kept and piece in found.kept[name]["text"]
    total = sum(kinds.values(), Counter())
    return {
        "defects": total.total(),
        "recall": total["found"] / total.total(),
        "kinds": {kind: count["found"] / count.total() for kind, count in sorted(kinds.items())},
        "clean": clean,
        "clean_dropped": len(wrong) / clean,
        "clean_dropped_ids": wrong,
        "median_f1": statistics.median(f1s),
        "preserved": kept_parts / parts,
        **personal(found, part),
        **duplicates(found, part),
    }


def personal(found: Slice, part: str) -> dict[str, float]:
    """Recall and precision of spans, in the documents that are labelled for them."""
    right = wanted = given = 0
    for name in found.names(part):
        if found.labels[name]["label"] == "pii" and name in found.kept:
            mine = {tuple(span[:2]) for span in found.kept[name]["pii"]}
            theirs = {tuple(span[:2]) for span in found.labels[name]["pii_spans"]}
            right, wanted, given = (
                right + len(mine & theirs),
                wanted + len(theirs),
                given + len(mine),
            )
    return {"pii_recall": right / wanted, "pii_precision": right / given, "pii_spans": wanted}


def duplicates(found: Slice, part: str) -> dict[str, float]:
    """Pairs that are not both kept, by similarity; and what was dropped for something unlike it."""
    pairs: dict[str, list[bool]] = {"exact": [], "0.8": [], "0.7": []}
    for name in found.names(part):
        label = found.labels[name]
        if label["label"] not in ("near_dup", "exact_dup") or label["jaccard5"] < 0.7:
            continue
        exact = label["label"] == "exact_dup"
        key = "exact" if exact else "0.8" if label["jaccard5"] >= 0.8 else "0.7"
        pairs[key].append(not (name in found.kept and label["dup_of"] in found.kept))
    unlike = sum(
        jaccard(shingle_set(found.raw[name], 5), shingle_set(found.raw[why["duplicate_of"]], 5))
        < 0.5
        for name, why in found.dropped.items()
        if why["step"] == "duplicates" and half(name) == part
    )
    return {
        "exact_recall": sum(pairs["exact"]) / max(1, len(pairs["exact"])),
        "near_recall_0.8": sum(pairs["0.8"]) / max(1, len(pairs["0.8"])),
        "near_recall_0.7": sum(pairs["0.7"]) / max(1, len(pairs["0.7"])),
        "near_pairs": len(pairs["0.8"]) + len(pairs["0.7"]),
        "false_merges": unlike,
    }


def head_of(source: Path, target: Path, size: int) -> int:
    """Write the first lines of a corpus, plain, to about this many bytes of text."""
    written = 0
    with target.open("w", encoding="utf-8") as stream:
        for record in read(source):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += len(record["text"].encode())
            if written >= size:
                break
    return written


def run(source: Path, target: Path, workers: int, part_bytes: int) -> dict[str, Any]:
    """Clean a file in a process of its own."""
    command = [sys.executable, "-c", RUN, str(source), str(target), str(workers), str(part_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cost(data: Path, work: Path, megabytes: int) -> dict[str, Any]:
    """Throughput with two workers, and the peak memory of a process at two sizes."""
    source = work / "english.jsonl"
    size = head_of(data / ENGLISH, source, megabytes * 1_000_000)
    found = run(source, work / "english", 2, max(1 << 20, size // 8))
    peaks = {}
    for share in (4, 1):
        part = work / f"part{share}.jsonl"
        read_bytes = head_of(data / ENGLISH, part, size // share)
        alone = run(part, work / f"memory{share}", 1, 1 << 30)
        peaks[f"{read_bytes / 1e6:.0f} MB"] = alone["peak_kib"] / 1024
    return {
        "megabytes": size / 1e6,
        "documents": found["documents"],
        "seconds": found["seconds"],
        "megabytes_per_second": size / 1e6 / found["seconds"],
        "stage_ended_at": found["ended"],
        "task_cpu_seconds": found["cpu"],
        "peak_mib": peaks,
    }


def main() -> None:
    """Run both parts and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the slice and of en_train.jsonl.xz")
    parser.add_argument("--megabytes", type=int, default=40, help="of English for the throughput")
    parser.add_argument("--scored", type=int, default=25, help="megabytes for the scorer")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell it")
    output = harness.RESULTS / "clean_cpu.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    environment = harness.environment(arguments.commit)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tables = {
            "input": {"path": str(arguments.data / DOCUMENTS)},
            "output": {"dir": str(work / "slice")},
            "executor": {"workers": 1},
        }
        clean_corpus(make_clean_config(tables))
        found = Slice(arguments.data, work / "slice")
        halves = {part: judge(found, part) for part in HALVES}
        spent = cost(arguments.data, work, arguments.megabytes)
        told = separation(arguments.data, work / "rounds", arguments.scored, None)
    kinds = sorted({kind for part in halves.values() for kind in part["kinds"]})
    figures = [name for name, value in halves["held"].items() if isinstance(value, int | float)]
    rows = [(name, *(f"{halves[part][name]:.4g}" for part in HALVES)) for name in figures]
    rows += [
        (f"recall, {kind}", *(f"{halves[part]['kinds'].get(kind, 1):.3f}" for part in HALVES))
        for kind in kinds
    ]
    harness.print_table(("figure", *HALVES), rows)
    print(
        f"{spent['megabytes_per_second']:.2f} MB/s with two workers; peak {spent['peak_mib']} MiB"
    )
    print_told(told)
    result = {
        "environment": environment,
        "halves": halves,
        "cost": spent,
        "selfclean": told,
    }
    harness.publish(result, arguments.output)


if __name__ == "__main__":
    main()
