"""What devices can do at most, from their makers' data sheets: the denominators of utilisation."""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Largest rates of one device.

    Attributes:
        bfloat16: operations a second of dense products, summed in float32; 2 a multiply-add.
        float32: of products in full float32, without tf32.
        bandwidth: bytes a second of its own memory.
    """

    bfloat16: float
    float32: float
    bandwidth: float

    def flops(self, precision: str) -> float:
        """Operations a second in "bfloat16" or "float32"."""
        return self.bfloat16 if precision == "bfloat16" else self.float32


def _peak(bfloat16: float, float32: float, bandwidth: float) -> Peak:
    """From Tflop/s and GB/s."""
    return Peak(bfloat16 * 1e12, float32 * 1e12, bandwidth * 1e9)


# By the name that the driver reports. NVIDIA's data sheets print bfloat16 rates with sparsity, twice
# the dense ones here: H100 and H200 (2024), A100 (2022), L4 and L40S (2023), A10 (2021); GeForce:
# appendices of the Ada (2023) and Ampere GA102 (2021) white papers, products summed in float32.
_PEAKS: dict[str, Peak] = {
    "NVIDIA H100 80GB HBM3": _peak(989.4, 66.9, 3350),
    "NVIDIA H100 PCIe": _peak(756.5, 51.2, 2000),
    "NVIDIA H100 NVL": _peak(835.5, 60.0, 3900),
    "NVIDIA H200": _peak(989.4, 66.9, 4800),
    "NVIDIA A100-SXM4-40GB": _peak(312.0, 19.5, 1555),
    "NVIDIA A100-SXM4-80GB": _peak(312.0, 19.5, 2039),
    "NVIDIA A100-PCIE-40GB": _peak(312.0, 19.5, 1555),
    "NVIDIA A100 80GB PCIe": _peak(312.0, 19.5, 1935),
    "NVIDIA A10": _peak(125.0, 31.2, 600),
    "NVIDIA L4": _peak(121.0, 30.3, 300),
    "NVIDIA L40S": _peak(362.0, 91.6, 864),
    "NVIDIA GeForce RTX 4090": _peak(165.2, 82.6, 1008),
    "NVIDIA GeForce RTX 3090": _peak(71.2, 35.6, 936),
}


def peak_of(name: str) -> Peak | None:
    """The rates of the device of this name; None where they are not known."""
    return _PEAKS.get(name)


def find_peak(name: str) -> tuple[str, Peak]:
    """The first device of the table whose name has these words in it, such as "h100" or "a100 80gb".

    Raises:
        ValueError: there is none; all names are listed.
    """
    words = set(name.lower().replace("-", " ").split())
    for known, peak in _PEAKS.items():
        # Whole words: an A10 is no A100.
        if words and words <= set(known.lower().replace("-", " ").split()):
            return known, peak
    raise ValueError(
        f"device is {name!r}; expected words of one of: {', '.join(_PEAKS)}; take one of those"
    )


def device_peak(device: torch.device) -> Peak | None:
    """The rates of a device; None for CPUs, and for GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))
