"""Where and in what precision a run computes."""

import torch


def choose_device(name: str) -> torch.device:
    """Return the device of train.device; RuntimeError where it asks for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "train.device is 'cuda'; expected a GPU that torch can use; set it to 'cpu' or 'auto'"
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return "float32" or "bfloat16"; auto is bfloat16 where the device multiplies it fast."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Older releases of torch cannot say; they get float32.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("amx_bf16") else "float32"


def autocast_for(precision: str, device: torch.device) -> torch.autocast | None:
    """Return the autocast context of a forward pass; None for float32, which needs none."""
    if precision == "float32":
        return None
    return torch.autocast(device.type, dtype=torch.bfloat16)
