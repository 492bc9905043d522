"""The state of torch's random number generators, to be kept and put back."""

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Copies of the generators' states: "cpu", and "cuda" of the current GPU once it is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put back what ``random_state`` returned; a GPU's where there is one."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
