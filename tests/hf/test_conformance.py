"""transformers' own suite for models (``ModelTesterMixin``), from its source distribution."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

# What the source distribution lacks of what its suite imports.
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_suite_of_transformers_passes(tmp_path: Path) -> None:
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized")
    name = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    got = subprocess.run(
        [*pip, "--no-build-isolation", "-d", str(tmp_path), name], capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"pip got no source distribution of {name}: {got.stderr.strip()[-200:]}")
    archive = next(tmp_path.glob("transformers-*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    tests = next(tmp_path.glob("transformers-*/tests"))
    own = tests / "models" / "transnormer" / "test_modeling_transnormer.py"
    files = ABSENT | {own.relative_to(tests).as_posix(): ""}
    for path, text in files.items():
        (tests / path).parent.mkdir(parents=True, exist_ok=True)
        (tests / path).write_text(text + "\n")
    for folder in (tests, *(x.parent for x in map(tests.joinpath, files))):
        (folder / "__init__.py").touch()
    (tests / "models" / "__init__.py").touch()
    own.write_text(Path(__file__).with_name("transformers_suite.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(own), "-q", "-p", "no:cacheprovider", "-W", "ignore"],
        cwd=tests.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1]
    print(summary)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed
    assert int(passed[1]) >= 140
    assert "failed" not in summary
