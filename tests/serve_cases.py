"""A server in a process of its own, for the tests of serve/."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI


@dataclass
class Server:
    """A process that serves.

    Attributes:
        url: where it listens.
        process: the process itself.
        lines: of its output.
        reader: adds to them.
    """

    url: str
    process: subprocess.Popen[str]
    lines: list[str]
    reader: threading.Thread

    def client(self, **options: object) -> httpx.Client:
        """A plain client, which asks no proxy."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60.0, **options)

    def openai(self, key: str = "none") -> OpenAI:
        """OpenAI's client, which tries once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End the process; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(30)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


Start = Callable[..., Server]


def start_server(folder: Path, *options: str) -> Server:
    """Serve a model on a free port, and wait until it answers."""
    # A proxy of the surroundings has no business on loopback.
    keep = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment = keep | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "transnormer", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://\S+", line):
            break
    else:
        raise RuntimeError(f"the server ended: {''.join(lines)}")

    def read() -> None:
        assert process.stdout is not None
        lines.extend(process.stdout)

    # Somebody has to read, or a talkative server would wait for it.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return Server(found[0], process, lines, reader)
