"""The configuration of a cleaning run: one TOML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from transnormer.clean.minhash import found_probability
from transnormer.clean.presets import PRESETS
from transnormer.clean.rules.quality import Quality
from transnormer.config import Config, apply_overrides, read_toml, validate

# What a document costs in the deduplication's memory and index, bytes.
INDEX_BYTES = 100
# Two digests of eight, and the size of its line.
_OTHER_BYTES = 20


class InputConfig(Config):
    """What to read.

    Attributes:
        path: a file, a directory or a glob: .jsonl, .txt, .md, .html, .htm, .warc, plain or with
            .gz, .xz or .zst, and .parquet.
        text_field, id_field: names in a line's object, or a table's columns.
        part_bytes: a larger file is cut into parts of this size, each a task of its own.
        max_document_bytes: a longer line or file is quarantined; it is never held in memory.
    """

    path: str
    text_field: str = "text"
    id_field: str = "id"
    part_bytes: int = 32 << 20
    max_document_bytes: int = 16 << 20


class OutputConfig(Config):
    """Where to write, and how: the directory and the compression of its .jsonl files."""

    dir: str
    compression: Literal["none", "gzip", "zstd"] = "none"


class RulesConfig(Config):
    """Which edits are made, in this order; each may be switched off.

    Attributes:
        pii: personal data becomes [EMAIL] and the like.
        encoding: wrongly decoded text is repaired (ftfy).
        html: a page becomes its text.
        controls: characters that show nothing go; spaces, line ends and composition are uniform.
        tags, urls, punctuation, numbers: as `rules.text` says; code, formulas and Markdown stay.
        boilerplate, watermarks: lines, as `rules.lines` says.
        languages: texts in others are dropped; empty keeps all.
    """

    pii: bool = True
    encoding: bool = True
    html: bool = True
    controls: bool = True
    tags: bool = True
    urls: bool = True
    punctuation: bool = True
    numbers: bool = True
    boilerplate: bool = True
    watermarks: bool = True
    languages: tuple[str, ...] = ()


class DedupConfig(Config):
    """Duplicates of documents.

    Attributes:
        exact: equal words in equal order, case and punctuation aside.
        near: Jaccard index of the shingles at or above `jaccard`, found by MinHash, then verified.
        bands, rows: of the signature: found is a pair with the probability
            1 - (1 - jaccard^rows)^bands.
        shingle_words: words of a shingle; in Chinese characters.
        jaccard: from here two documents are duplicates.
        keep_below: of a chain of duplicates none is dropped that is less similar than this to the
            document that is kept.
        containment: a document is dropped when this share of its shingles stands in one that is
            kept, whatever else that holds; 0 switches it off.
        pieces: also lines, or paragraphs, that repeat those of an earlier document are cut, by the
            same two switches and the same index.
        piece_words: shorter lines and paragraphs are everybody's, and stay.
        seed: of the hash functions.
    """

    exact: bool = True
    near: bool = True
    bands: int = 20
    rows: int = 5
    shingle_words: int = 5
    jaccard: float = 0.7
    keep_below: float = 0.5
    containment: float = 0.0
    pieces: Literal["none", "lines", "paragraphs"] = "none"
    piece_words: int = 20
    seed: int = 1

    @model_validator(mode="after")
    def _check(self) -> "DedupConfig":
        if not 0.0 < self.keep_below <= self.jaccard <= 1.0:
            raise ValueError(
                f"keep_below is {self.keep_below}; expected above 0 and at most jaccard "
                f"({self.jaccard}), which is at most 1"
            )
        if min(self.bands, self.rows, self.shingle_words) < 1:
            raise ValueError(f"bands is {self.bands}; expected bands, rows, shingle_words from 1")
        if self.piece_words < self.shingle_words:
            raise ValueError(
                f"piece_words is {self.piece_words}; expected at least shingle_words "
                f"({self.shingle_words})"
            )
        if 4 * self.bands + _OTHER_BYTES > INDEX_BYTES:
            raise ValueError(
                f"bands is {self.bands}; expected at most {(INDEX_BYTES - _OTHER_BYTES) // 4}, "
                f"so that a document costs {INDEX_BYTES} bytes of index"
            )
        if self.near and self.found < 0.95:
            raise ValueError(
                f"bands is {self.bands}; expected enough of {self.rows} rows to find 0.95 of the "
                f"pairs at jaccard {self.jaccard}: these find {self.found:.3f}; raise bands or "
                "lower rows"
            )
        return self

    @property
    def found(self) -> float:
        """The share of pairs at `jaccard` that become candidates."""
        return found_probability(self.jaccard, self.bands, self.rows)


class DecontaminateConfig(Config):
    """Texts that must not be in the corpus: evaluation sets.

    Attributes:
        path: .jsonl files whose texts are all their strings, or .txt and .md files; empty is off.
        ngram: a document that shares so many consecutive words with one of them is dropped. A text
            of fewer words, but not of fewer than `min_words`, is looked for whole.
        min_words: shorter texts are everybody's words.
    """

    path: str = ""
    ngram: int = 13
    min_words: int = 8


class SelfCleanConfig(Config):
    """The self-cleaning loop; off without rounds.

    Attributes:
        rounds: at most so many.
        scorer: byte n-grams, or a model that `run` trains.
        run: TOML file of a training run, as `transnormer train` reads it; its data.path and
            output.dir are replaced.
        folds: each document is scored by a scorer that saw the other folds.
        order: longest run of bytes that the n-gram scorer counts.
        high: robust deviations at which a text is too unlikely, those of its bits and those that
            its gain from context falls short by taken together.
        low: robust deviations at which it is too likely.
        max_drop: share of the documents that one round may drop, the most severe first.
        min_drop: a round that drops less is the last.
        heldout: a text file that no round trains on; modelled worse than before, it ends the loop.
        review: documents on the sheet review.csv.
        verdicts: such a sheet with its column `verdict` filled: keep or drop, which stand over
            every score.
        seed: of the sheet's sample.
    """

    rounds: int = 0
    scorer: Literal["ngram", "model"] = "ngram"
    run: str = ""
    folds: int = 2
    order: int = 6
    high: float = 5.0
    low: float = 8.0
    max_drop: float = 0.05
    min_drop: float = 0.002
    heldout: str = ""
    review: int = 100
    verdicts: str = ""
    seed: int = 1

    @model_validator(mode="after")
    def _check(self) -> "SelfCleanConfig":
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; expected at least 2: no text scores itself")
        if min(self.high, self.low) <= 0:
            raise ValueError(f"high is {self.high}; expected high and low ({self.low}) above 0")
        if self.scorer == "model" and not self.run:
            raise ValueError("run is ''; expected the TOML file of a training run")
        return self


class ExecutorConfig(Config):
    """Which of datatrove's executors runs the tasks.

    Attributes:
        kind: this machine, Slurm or Ray.
        workers: tasks at a time.
        time, partition: Slurm's, for each task.
        env_command: what a Slurm task runs first, such as the activation of an environment.
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = 2
    time: str = "24:00:00"
    partition: str = ""
    env_command: str = ""

    @model_validator(mode="after")
    def _check(self) -> "ExecutorConfig":
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected at least 1")
        if self.kind == "slurm" and not self.partition:
            raise ValueError("partition is ''; expected the name of one for Slurm")
        return self


class CleanConfig(Config):
    """A cleaning run.

    Attributes:
        preset: the thresholds that `quality` starts from: paper, gopher, c4 or fineweb.
        on_bad_input: what cannot be read is written to quarantined/, or stops the run.
    """

    preset: Literal["paper", "gopher", "c4", "fineweb"] = "paper"
    on_bad_input: Literal["quarantine", "stop"] = "quarantine"
    input: InputConfig
    output: OutputConfig
    rules: RulesConfig = RulesConfig()
    quality: Quality = Quality()
    dedup: DedupConfig = DedupConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    selfclean: SelfCleanConfig = SelfCleanConfig()
    executor: ExecutorConfig = ExecutorConfig()


def read_clean_config(path: Path, overrides: Sequence[str] = ()) -> CleanConfig:
    """Read a run's TOML file; `overrides` are "key.subkey=value".

    Raises FileNotFoundError, or ValueError that names the key.
    """
    return make_clean_config(apply_overrides(read_toml(path), overrides), source=str(path))


def make_clean_config(data: Mapping[str, Any], *, source: str = "configuration") -> CleanConfig:
    """Build a configuration; the preset's thresholds fill those that are not given."""
    filled = dict(data)
    preset, quality = filled.get("preset", "paper"), filled.get("quality", {})
    if isinstance(preset, str) and preset in PRESETS and isinstance(quality, Mapping):
        filled["quality"] = {**PRESETS[preset], **quality}
    return validate(CleanConfig, filled, source=source)
