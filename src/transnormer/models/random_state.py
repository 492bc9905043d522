"""The state of torch's random number generators, to be kept and put back."""

import torch
from torch import Tensor, nn


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


def drops_in_training(model: nn.Module) -> bool:
    """Whether a part of a model has dropout, a number of its own or torch's layer, as adapters have."""
    shares = (
        part.p if isinstance(part, nn.Dropout) else getattr(part, "dropout", 0.0)
        for part in model.modules()
    )
    return any(isinstance(share, float) and share > 0 for share in shares)
