"""docs/adding_a_mixer.md, followed to the letter on a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nn.mixer_cases import KINDS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "adding_a_mixer.md"


def insert(path: Path, before: str, text: str) -> None:
    """Put text in front of the one place where a file says ``before``."""
    content = path.read_text(encoding="utf-8")
    assert content.count(before) == 1, f"{path} has {before!r} {content.count(before)} times"
    path.write_text(content.replace(before, text + before), encoding="utf-8")


def follow(root: Path) -> None:
    """Do in a copy of the project what the document says."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    mixer, mixer_import, zoo, zoo_import, zoo_row, cases = blocks
    mixers, sizes = (
        root / "src" / "transnormer" / folder for folder in ("nn/token_mixers", "models/zoo")
    )
    (mixers / "scalar_gate.py").write_text(mixer, encoding="utf-8")
    first = "from transnormer.nn.token_mixers.base import"
    insert(mixers / "__init__.py", first, mixer_import)
    union = mixers / "__init__.py"
    content = union.read_text(encoding="utf-8")
    content, count = re.subn(
        r"(TokenMixerConfig = Annotated\[\s*)", r"\1ScalarGateConfig | ", content
    )
    assert count == 1
    union.write_text(content, encoding="utf-8")
    insert(union, '    "TokenMixer",\n', '    "ScalarGate",\n    "ScalarGateConfig",\n')
    (sizes / "scalar_gate.py").write_text(zoo, encoding="utf-8")
    insert(sizes / "__init__.py", "\n__all__", zoo_import)
    insert(sizes / "__init__.py", '    "tnl": (', zoo_row)
    listed = root / "tests" / "nn" / "mixer_cases.py"
    insert(listed, "\nCASES: tuple", cases)
    insert(listed, "    *SOFTMAX,\n", "    *SCALAR_GATE,\n")
    insert(listed, "    SoftmaxConfig,\n", "    ScalarGateConfig,\n")


def test_the_architecture_lists_every_kind_and_its_file() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+\.py)` \|", document, re.M))
    assert listed == {kind: f"{kind}.py" for kind in KINDS}
    folder = ROOT / "src" / "transnormer" / "nn" / "token_mixers"
    assert {path.name for path in folder.glob("*.py")} == {
        "__init__.py",
        "base.py",
        *listed.values(),
    }


@pytest.fixture
def followed(tmp_path: Path) -> Path:
    """A copy of the project in which the document was followed."""
    for folder in ("src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    follow(tmp_path)
    return tmp_path


def test_the_places_that_the_document_names_are_there(followed: Path) -> None:
    code = (
        "from nn.mixer_cases import SCALAR_GATE; from transnormer.models import zoo; "
        "print(len(SCALAR_GATE), *[name for name in zoo.names() if 'scalar' in name])"
    )
    paths = [str(followed / folder) for folder in ("src", "tests")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=followed,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.split()[0] == "2", done.stdout
    assert "scalar" in done.stdout


@pytest.mark.slow
def test_the_document_leads_to_a_mixer_that_keeps_the_contract(followed: Path) -> None:
    suites = ("nn/test_mixer_contract.py", "models/test_cost.py", "models/test_zoo_table.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-m",
        "not slow",
        "-k",
        "scalar_gate and not compiles",
        *(f"tests/{suite}" for suite in suites),
    ]
    done = subprocess.run(
        command,
        cwd=followed,
        env={**os.environ, "PYTHONPATH": str(followed / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    # Two configurations through the contract, one size through the zoo.
    assert int(passed[1]) > 40
