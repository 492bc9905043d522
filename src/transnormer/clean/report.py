"""The report of a run: report.json, and report.html for people."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import CleanConfig
from transnormer.clean.index import unit_name
from transnormer.clean.item import Item
from transnormer.clean.page import report_page
from transnormer.clean.places import Places
from transnormer.clean.tally import Tally
from transnormer.files import read_json, write_atomic

REPORT, PAGE = "report.json", "report.html"


class WriteReport(PipelineStep):
    """One task: the last of a run."""

    type = "write"
    name = "report"

    def __init__(self, places: Places, units: int, config: CleanConfig) -> None:
        super().__init__()
        self._places, self._units, self._config = places, units, config
        self._output = Path(config.output.dir)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Write both files, then remove the intermediate documents."""
        report = self._add_up()
        write_atomic(self._output / PAGE, report_page(report).encode("utf-8"))
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self._output / REPORT, text.encode("utf-8"))
        for unit in range(self._units):
            for suffix in (".jsonl", ".npz", "_pieces.npz"):
                (self._places.indexed / f"{unit_name(unit)}{suffix}").unlink(missing_ok=True)
        yield from ()

    def _add_up(self) -> dict[str, Any]:
        total = Tally()
        seconds = {"rules": 0.0, "clean": 0.0}
        used = dict(seconds)
        for stage, folder in (("rules", self._places.indexed), ("clean", self._places.counts)):
            for unit in range(self._units):
                data = read_json(folder / f"{unit_name(unit)}.json")
                seconds[stage] += data["seconds"]
                used[stage] += data["cpu_seconds"]
                total.merge(Tally(data))
        counted = total.counts["documents"]
        if counted["read"] != counted["kept"] + counted["dropped"] + counted["quarantined"]:
            raise RuntimeError(
                f"documents are {dict(counted)}; expected read = kept + dropped + quarantined"
            )
        return {
            "config": self._config.model_dump(mode="json"),
            "found_at_threshold": self._config.dedup.found,
            "pairs": read_json(self._places.found / "counts.json"),
            "pieces": self._pieces(),
            "task_seconds": seconds,
            "task_cpu_seconds": used,
            "rounds": self._rounds(),
            **total.dump(),
        }

    def _pieces(self) -> dict[str, int]:
        """What the search among lines or paragraphs looked at; nothing where it is off."""
        path = self._places.pieces / "counts.json"
        return read_json(path) if path.is_file() else {}

    def _rounds(self) -> list[dict[str, Any]]:
        """The manifests of the self-cleaning rounds without their lists and bands."""
        left_out = ("dropped", "bands", "config")
        return [
            {name: value for name, value in read_json(path).items() if name not in left_out}
            for path in sorted(self._places.rounds.glob("round_*.json"))
        ]
