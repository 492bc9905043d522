"""Every code block of README.md and docs/ runs as it stands, in a folder that holds a small run.

A block that cannot run here says why in a line before it, <!-- not run: REASON -->; a command that
cannot is listed in code_blocks.NOT_RUN.
"""

import os
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from docs.code_blocks import (
    TEXT,
    Block,
    Reader,
    blocks_of,
    commands_of,
    reason_of,
    starts_processes,
)
from train_cases import run_file, some_text

from transnormer.cli.app import run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Documents whose blocks another test follows.
FOLLOWED = {
    "docs/adding_a_mixer.md": "tests/test_adding_a_mixer.py",
    "docs/huggingface.md": "tests/hf/test_docs.py",
    "docs/serving.md": "tests/serve/test_docs.py",
}


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def with_code() -> list[Path]:
    return [x for x in DOCUMENTS if name_of(x) not in FOLLOWED and blocks_of(x)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a clone after `make quickstart`, with a smaller run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "docs"):
        ignored = shutil.ignore_patterns("*.png", "*.svg", "site")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copy(ROOT / "README.md", folder)
    (folder / "corpus.txt").write_text(some_text())
    (folder / "FOLDER").mkdir()
    for name, text in sorted(topics.items())[:40]:
        (folder / "FOLDER" / f"{name}.txt").write_text(text)
    (folder / "recipes" / "quickstart.toml").write_text(
        run_file(output="runs/quickstart", eval_every=2)
    )
    (folder / "RUN.toml").write_text(run_file(output="runs/of-run-toml", eval_every=2))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(["train", "recipes/quickstart.toml"]) == 0
    finally:
        os.chdir(before)
    return folder


def of_many_processes(document: Path) -> bool:
    shell = [block for block in blocks_of(document) if block.language == "sh"]
    return any(starts_processes(words) for block in shell for words in commands_of(block))


@pytest.mark.parametrize(
    ("document", "processes"),
    [
        *(pytest.param(x, False, id=name_of(x)) for x in with_code()),
        *(
            pytest.param(x, True, id=f"{name_of(x)}-processes", marks=pytest.mark.slow)
            for x in with_code()
            if of_many_processes(x)
        ),
    ],
)
def test_the_code_of_a_document_runs(
    document: Path,
    processes: bool,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    reader = Reader(name_of(document), {"__name__": "__main__"}, processes)
    for block in blocks_of(document):
        reader.read(block)
    print("\n".join(["ran:", *reader.done, "not run:", *reader.left]))


@pytest.mark.parametrize("document", [ROOT / name for name in FOLLOWED], ids=name_of)
def test_other_tests_follow_the_other_documents(document: Path) -> None:
    test = (ROOT / FOLLOWED[name_of(document)]).read_text(encoding="utf-8")
    assert document.name in test


def test_few_blocks_are_not_run() -> None:
    every = [block for document in with_code() for block in blocks_of(document)]
    left = [block for block in every if reason_of(block) is not None]
    assert len(left) <= len(every) // 3


def test_no_block_of_commands_goes_without_a_language() -> None:
    pattern = re.compile(r"^```\n(?:transnormer|torchrun|pip|make) ", re.M)
    assert [name_of(x) for x in DOCUMENTS if pattern.search(x.read_text("utf-8"))] == []


def test_a_block_that_fails_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```text\nno code\n```\n\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n"
        "```python\n1 / 0\n```\n\n```sh\nmake test\n```\n\n```python\nassert x == 2\n```\n"
    )
    blocks = blocks_of(page)
    assert [block.line for block in blocks] == [5, 10, 14, 18]
    assert "text" in TEXT
    reader = Reader("page.md", {})
    for block in blocks[:3]:
        reader.read(block)
    assert reader.done == ["page.md:5"]
    assert [text.split()[0] for text in reader.left] == ["page.md:10", "page.md:14"]
    with pytest.raises(AssertionError):
        reader.read(blocks[3])
    with pytest.raises(AssertionError, match="page.md:1 is a block in 'rust'"):
        reader.read(Block(1, "rust", "", None))
    with pytest.raises(AssertionError, match="rm is no command"):
        reader.read(Block(1, "sh", "rm\n", None))
