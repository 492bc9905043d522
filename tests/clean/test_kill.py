"""A real process that cleans is killed, again and again, at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clean_cases import edited, prose, read_lines, run_clean, where_ids_went, write_lines

KILLS = 12


def command(source: Path, target: Path) -> list[str]:
    toml = target.with_suffix(".toml")
    toml.write_text(
        f'[input]\npath = "{source}"\npart_bytes = 20000\n[output]\ndir = "{target}"\n'
        "[executor]\nworkers = 2\n"
    )
    return [sys.executable, "-m", "transnormer", "clean", str(toml), "--json"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    rng = random.Random(1)
    source = tmp_path / "in"
    for number in range(8):
        texts = [prose(1000 * number + n, 150) for n in range(150)]
        texts += [edited(text, n, 2) for n, text in enumerate(texts[:20])]
        records = [{"id": f"{number}-{n}", "text": text} for n, text in enumerate(texts)]
        write_lines(source / f"{number}.jsonl", records)
    run_clean(source, tmp_path / "whole", input={"part_bytes": 20000})
    target = tmp_path / "out"
    for _ in range(KILLS):
        # A group of its own, so that the workers die with it.
        process = subprocess.Popen(
            command(source, target), stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(1.0, 9.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = subprocess.run(command(source, target), capture_output=True, text=True, check=True)
    facts = json.loads(last.stdout.splitlines()[-1])
    assert facts["read"] == 8 * 170
    assert len(where_ids_went(target)) == 8 * 170
    for folder in ("clean", "dropped"):
        assert read_lines(target / folder) == read_lines(tmp_path / "whole" / folder)


@pytest.mark.slow
def test_an_interrupt_ends_the_command_and_the_next_one_goes_on(tmp_path: Path) -> None:
    texts = [{"id": n, "text": prose(n, 200)} for n in range(3000)]
    source = write_lines(tmp_path / "in.jsonl", texts)
    process = subprocess.Popen(
        command(source, tmp_path / "out"), stdout=subprocess.PIPE, start_new_session=True
    )
    plan = tmp_path / "out" / "work" / "plan.json"
    while not plan.is_file():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    subprocess.run(command(source, tmp_path / "out"), check=True, capture_output=True)
    assert len(where_ids_went(tmp_path / "out")) == 3000
