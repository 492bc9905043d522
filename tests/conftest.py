"""What every test starts from: one thread, fixed seeds, no network, poisoned fresh memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreter import patch_language_once_a_launch

# A hub name would otherwise be retried for 20 seconds before it fails.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# cuBLAS refuses to run under deterministic algorithms without a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter on a CPU; it must be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_configure() -> None:
    """Set what is the same for the whole run."""
    # The tensors of the tests are small: a second thread costs more than it brings.
    torch.set_num_threads(1)
    # tf32 would hide a lost digit on GPUs.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    patch_language_once_a_launch()


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """Seed, and fill fresh memory with NaN, so that reading what nobody wrote shows."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        # Without the walk through the stack for each kind of accelerator that is not here.
        torch.default_generator.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared inputs beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared inputs is not beside this checkout")
    return SHARED.resolve()
