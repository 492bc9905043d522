"""The loop as a step of the pipeline: between the search for duplicates and the clean documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import SelfCleanConfig
from transnormer.clean.index import Index, unit_name
from transnormer.clean.item import Item
from transnormer.clean.pieces import cut, cuts_path
from transnormer.clean.selfclean import review
from transnormer.clean.selfclean.loop import Scorer, Text, run_rounds
from transnormer.clean.selfclean.ngram import NgramScorer
from transnormer.clean.tally import source_of
from transnormer.files import read_json, write_atomic

SHEET = "review.csv"


class SelfClean(PipelineStep):
    """One task over all units: adds to what FindDuplicates wrote; writes rounds and the sheet."""

    type = "selfclean"
    name = "rounds"

    def __init__(
        self,
        indexed: Path,
        found: Path,
        target: Path,
        units: int,
        config: SelfCleanConfig,
        output: Path,
        cuts: Path | None = None,
    ) -> None:
        """cuts: FindPieces', whose parts are gone before a document is scored."""
        super().__init__()
        self._cuts = cuts
        self._indexed, self._found, self._target = indexed, found, target
        self._units, self._config, self._output = units, config, output

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Run the rounds and write; nothing is passed on."""
        index = Index(self._indexed, self._units)
        removed = [
            orjson.loads((self._found / f"{unit_name(unit)}.json").read_bytes())
            for unit in range(self._units)
        ]
        cuts = [read_json(cuts_path(self._cuts, unit)) for unit in range(self._units) if self._cuts]
        left = _Left(index, removed, cuts)
        gone = run_rounds(left, self._config, self._scorer, self._target)
        self._write_sheet(left, gone)
        for number, why in gone.items():
            unit, place = index.place(number)
            removed[unit][str(place)] = why
        for unit, whys in enumerate(removed):
            write_atomic(self._target / f"{unit_name(unit)}.json", orjson.dumps(whys))
        yield from ()

    def _scorer(self, number: int, fold: int) -> Scorer:
        if self._config.scorer == "ngram":
            return NgramScorer(self._config.order)
        # Only here: it brings torch.
        from transnormer.clean.selfclean.model import ModelScorer

        return ModelScorer(Path(self._config.run), self._target / f"model_{number:02d}_{fold}")

    def _write_sheet(self, left: "_Left", gone: dict[int, dict[str, Any]]) -> None:
        severities = last_severities(self._target)
        severities.update({number: why["severity"] for number, why in gone.items()})
        numbers = sorted(severities)
        values = [severities[number] for number in numbers]
        chosen = review.choose(values, self._config.review, self._config.seed)
        wanted = {numbers[place] for place in chosen}
        rows = [
            review.Row(
                text.id,
                "dropped" if text.number in gone else "kept",
                severities[text.number],
                text.source,
                text.language,
                text.text,
            )
            for text in left.texts()
            if text.number in wanted
        ]
        rows.sort(key=lambda row: -row.severity)
        write_atomic(self._output / SHEET, review.sheet(rows))


class _Left:
    """The documents that no earlier stage removed."""

    def __init__(
        self, index: Index, removed: list[dict[str, Any]], cuts: list[dict[str, Any]]
    ) -> None:
        self._index = index
        self._cuts = {
            int(index.starts[unit]) + int(place): parts
            for unit, found in enumerate(cuts)
            for place, parts in found.items()
        }
        self._removed = {
            int(index.starts[unit]) + int(place)
            for unit, whys in enumerate(removed)
            for place in whys
        }

    def texts(self) -> Iterator[Text]:
        """Yield them in their order."""
        for number, item in enumerate(self._index.items()):
            if number not in self._removed:
                if number in self._cuts:
                    cut(item, self._cuts[number])
                yield Text(number, item.id, item.text, source_of(item), item.language)


def last_severities(directory: Path) -> dict[int, float]:
    """How far out each document was in the last round that saw it."""
    found: dict[int, float] = {}
    for path in sorted(directory.glob("round_*.npz")):
        with np.load(path, allow_pickle=False) as data:
            found.update(zip(data["numbers"].tolist(), data["severities"].tolist(), strict=True))
    return found
