"""What the tests of the vLLM plugin share: processes of their own, and requests."""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
Request = tuple[list[int], int]
# An engine starts in half a minute: each of its processes imports vLLM anew.
_PATIENCE = 800.0
_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM's own: gigabytes of cache, and processes that are not tied to cores of their own.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def child(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **_VARIABLES, **variables},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


def prompt(length: int, seed: int) -> list[int]:
    """Ids of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


def mixed_requests() -> list[Request]:
    """More requests than run at once, of many lengths; one-token prompts take over used slots."""
    lengths = ((300, 12), (1, 5), (33, 12), (7, 3), (280, 6), (1, 9), (2, 8))
    return [(prompt(length, seed), count) for seed, (length, count) in enumerate(lengths)]
