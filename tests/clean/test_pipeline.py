"""A whole run: every document is in one place, and a run that stopped goes on."""

import json
import resource
from pathlib import Path

import pytest
from clean_cases import configure, edited, prose, read_lines, run_clean, where_ids_went, write_lines

from transnormer.clean import pipeline
from transnormer.clean.pipeline import clean_corpus
from transnormer.clean.sinks import WriteIndexed


def corpus(directory: Path, files: int = 3, documents: int = 12) -> Path:
    for number in range(files):
        records = [
            {"id": f"{number}-{n}", "text": prose(100 * number + n), "source": f"s{number}"}
            for n in range(documents)
        ]
        records.append({"id": f"{number}-short", "text": "too short"})
        records.append({"id": f"{number}-copy", "text": edited(prose(100 * number), 1, 1)})
        write_lines(directory / f"{number}.jsonl", records)
    return directory


def test_every_document_is_in_exactly_one_place(tmp_path: Path) -> None:
    report = run_clean(corpus(tmp_path / "in"), tmp_path / "out")
    places = where_ids_went(tmp_path / "out")
    assert len(places) == 42
    assert {name for name, place in places.items() if place == "dropped"} == {
        f"{number}-{kind}" for number in range(3) for kind in ("short", "copy")
    }
    assert report["documents"] == {"read": 42, "kept": 36, "dropped": 6}
    assert report["reasons"] == {"rules: min_words": 3, "duplicates: near": 3}
    assert report["sources_kept"] == {"s0": 12, "s1": 12, "s2": 12}


def test_other_fields_edits_and_personal_data_are_written(tmp_path: Path) -> None:
    text = prose(1) + " Write to a@example.org!!!!"
    write_lines(tmp_path / "in.jsonl", [{"id": 7, "text": text, "source": "s", "n": [1]}])
    run_clean(tmp_path / "in.jsonl", tmp_path / "out")
    (record,) = read_lines(tmp_path / "out" / "clean")
    at = text.index("a@")
    assert record == {
        "id": "7",
        "text": prose(1) + " Write to [EMAIL]!",
        "edits": {"pii": 1, "punctuation": 1},
        "pii": [[at, at + 13, "email"]],
        "language": record["language"],
        "source": "s",
        "n": [1],
    }


def test_cleaned_text_is_clean(tmp_path: Path) -> None:
    run_clean(corpus(tmp_path / "in"), tmp_path / "a")
    report = run_clean(tmp_path / "a" / "clean", tmp_path / "b")
    assert report["documents"] == {"read": 36, "kept": 36}
    assert [r["text"] for r in read_lines(tmp_path / "a" / "clean")] == [
        r["text"] for r in read_lines(tmp_path / "b" / "clean")
    ]


def test_parts_and_workers_change_nothing(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    run_clean(source, tmp_path / "one")
    run_clean(source, tmp_path / "two", input={"part_bytes": 3000}, executor={"workers": 2})
    for folder in ("clean", "dropped"):
        one, two = (
            sorted(json.dumps(r) for r in read_lines(tmp_path / name / folder))
            for name in ("one", "two")
        )
        assert one == two


def test_a_run_that_failed_goes_on_and_skips_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path / "in")
    run_clean(source, tmp_path / "whole")
    real, ranks = WriteIndexed.run, []

    def failing(self, data, rank=0, world_size=1):
        ranks.append(rank)
        if rank == 1 and ranks.count(1) == 1:
            # Half of the unit is written when the disk is full.
            next(iter(data))
            (self._directory / "00001.jsonl").write_text("half")
            raise OSError(28, "No space left on device")
        yield from real(self, data, rank, world_size)

    monkeypatch.setattr(WriteIndexed, "run", failing)
    with pytest.raises(OSError, match="No space left"):
        run_clean(source, tmp_path / "out")
    run_clean(source, tmp_path / "out")
    assert ranks == [0, 1, 1, 2]
    for folder in ("clean", "dropped"):
        assert read_lines(tmp_path / "out" / folder) == read_lines(tmp_path / "whole" / folder)
    assert run_clean(source, tmp_path / "out")["documents"]["kept"] == 36
    assert ranks == [0, 1, 1, 2]


def test_a_disk_that_refuses_writes_stops_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    run_clean(source, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow further: what a full disk does, in the middle of a unit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            run_clean(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "report.json").exists()
    run_clean(source, tmp_path / "out")
    for folder in ("clean", "dropped"):
        assert read_lines(tmp_path / "out" / folder) == read_lines(tmp_path / "whole" / folder)


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", files=1)
    run_clean(source, tmp_path / "out")
    with pytest.raises(ValueError, match="a run of another config"):
        run_clean(source, tmp_path / "out", preset="gopher")
    corpus(tmp_path / "in", files=2)
    with pytest.raises(ValueError, match="a run of another units"):
        run_clean(source, tmp_path / "out")


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", files=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        run_clean(source, tmp_path / "out")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_output_may_be_compressed(compression: str, tmp_path: Path) -> None:
    from transnormer.data import read_documents

    source = corpus(tmp_path / "in", files=1)
    config = configure(source, tmp_path / "out").model_dump(mode="json")
    config["output"]["compression"] = compression
    from transnormer.clean.config import make_clean_config

    clean_corpus(make_clean_config(config))
    # What was written is what the trainer reads.
    assert len(list(read_documents(str(tmp_path / "out" / "clean")))) == 12


def test_languages_that_are_not_wanted_are_dropped(tmp_path: Path) -> None:
    chinese = (
        "线性注意力把序列的计算量降到线性，推理时的状态大小不变。这是一个例子，用来测试语言识别。"
    )
    write_lines(tmp_path / "in.jsonl", [{"id": "zh", "text": chinese}])
    report = run_clean(tmp_path / "in.jsonl", tmp_path / "out", rules={"languages": ["en"]})
    assert report["reasons"] == {"rules: language": 1}


def test_evaluation_texts_are_found_and_named(tmp_path: Path) -> None:
    question = "Which of the seven rivers of the plain runs backwards once a year in spring?"
    short = "Nine words of a question are enough for this."
    write_lines(
        tmp_path / "eval" / "set.jsonl", [{"q": "Too short."}, {"q": {"text": [question, short]}}]
    )
    records = [
        {"id": "good", "text": prose(1)},
        {"id": "hit", "text": prose(2) + " " + question.upper() + " " + prose(3)},
        {"id": "short", "text": prose(4) + " " + short + " " + prose(5)},
        {
            "id": "near",
            "text": prose(6) + " Which of the seven rivers of the plain is it? " + prose(7),
        },
    ]
    write_lines(tmp_path / "in.jsonl", records)
    run_clean(
        tmp_path / "in.jsonl",
        tmp_path / "out",
        decontaminate={"path": str(tmp_path / "eval")},
    )
    places = where_ids_went(tmp_path / "out")
    assert places == {"good": "clean", "near": "clean", "hit": "dropped", "short": "dropped"}
    dropped = read_lines(tmp_path / "out" / "dropped")
    assert all(record["hits"] == [f"{tmp_path / 'eval' / 'set.jsonl'}:2"] for record in dropped)


def test_the_page_escapes_what_the_corpus_holds(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"id": "<i>", "text": "<script>alert(1)</script> x"}])
    run_clean(tmp_path / "in.jsonl", tmp_path / "out", rules={"tags": False})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'src="data:image/png' in page
    assert "http" not in page


def test_progress_tells_every_stage(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = configure(corpus(tmp_path / "in"), tmp_path / "out")
    clean_corpus(config, progress=lambda *facts: seen.append(facts))
    assert [facts for facts in seen if facts[1] == facts[2]][0] == ("rules", 3, 3)
    assert seen[-1] == ("report", 1, 1)


def test_slurm_gets_every_stage_with_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def submit(command: list[str], **_: object) -> bytes:
        commands.append(Path(command[-1]).read_text())
        commands.append(" ".join(command))
        return f"Submitted batch job {len(commands)}".encode()

    import datatrove.executor.slurm as slurm

    monkeypatch.setattr(slurm.subprocess, "check_output", submit)
    config = configure(
        corpus(tmp_path / "in"),
        tmp_path / "out",
        executor={"kind": "slurm", "partition": "cpu", "workers": 2},
    )
    assert pipeline.clean_corpus(config) is None
    scripts = "\n".join(commands)
    assert scripts.count("--job-name") + scripts.count("job-name=") >= 4
    assert "transnormer-clean-report" in scripts
    assert "afterok" in scripts
