"""Published sizes as functions, each with its source; named ``family-size`` on the command line."""

import difflib

from transnormer.models.decoder import DecoderConfig
from transnormer.models.zoo.ablations import ABLATIONS, ablation
from transnormer.models.zoo.cosformer import SIZES as _COSFORMER_SIZES
from transnormer.models.zoo.cosformer import cosformer
from transnormer.models.zoo.cosformer2 import cosformer2, cosformer2_custom
from transnormer.models.zoo.eos import SIZES as _EOS_SIZES
from transnormer.models.zoo.eos import eos, eos_custom
from transnormer.models.zoo.flash import SIZES as _FLASH_SIZES
from transnormer.models.zoo.flash import flash, flash_custom
from transnormer.models.zoo.hgrn2 import HGRN1_SIZES as _HGRN1_SIZES
from transnormer.models.zoo.hgrn2 import hgrn1, hgrn2
from transnormer.models.zoo.hybrid import SIZES as _HYBRID_SIZES
from transnormer.models.zoo.hybrid import hybrid, hybrid_custom
from transnormer.models.zoo.lightnet import SIZES as _LIGHTNET_SIZES
from transnormer.models.zoo.lightnet import lightnet, lightnet_custom
from transnormer.models.zoo.llama import SIZES as _LLAMA_SIZES
from transnormer.models.zoo.llama import llama, llama_custom
from transnormer.models.zoo.retnet import SIZES as _RETNET_SIZES
from transnormer.models.zoo.retnet import retnet
from transnormer.models.zoo.scaling import SCALING_SIZES as _SCALING_SIZES
from transnormer.models.zoo.small import SIZES as _SMALL_SIZES
from transnormer.models.zoo.small import small
from transnormer.models.zoo.tnl import SIZES as _TNL_SIZES
from transnormer.models.zoo.tnl import tnl, tnl_custom, tnl_scaling
from transnormer.models.zoo.transnormer import SIZES as _TRANSNORMER_SIZES
from transnormer.models.zoo.transnormer import transnormer, transnormer_custom

__all__ = [
    "ABLATIONS",
    "ablation",
    "check_name",
    "cosformer",
    "cosformer2",
    "cosformer2_custom",
    "eos",
    "eos_custom",
    "flash",
    "flash_custom",
    "get",
    "hgrn1",
    "hgrn2",
    "hybrid",
    "hybrid_custom",
    "lightnet",
    "lightnet_custom",
    "llama",
    "llama_custom",
    "names",
    "retnet",
    "small",
    "tnl",
    "tnl_custom",
    "tnl_scaling",
    "transnormer",
    "transnormer_custom",
]

_FAMILIES = {
    "cosformer": (cosformer, _COSFORMER_SIZES),
    "cosformer2": (cosformer2, _SCALING_SIZES),
    "eos": (eos, _EOS_SIZES),
    "flash": (flash, _FLASH_SIZES),
    "hgrn1": (hgrn1, _HGRN1_SIZES),
    "hgrn2": (hgrn2, _SCALING_SIZES),
    "hybrid": (hybrid, _HYBRID_SIZES),
    "lightnet": (lightnet, _LIGHTNET_SIZES),
    "llama": (llama, _LLAMA_SIZES),
    "retnet": (retnet, _RETNET_SIZES),
    "small": (small, _SMALL_SIZES),
    "tnl": (tnl, _TNL_SIZES),
    "tnl_scaling": (tnl_scaling, _SCALING_SIZES),
    "transnormer": (transnormer, _TRANSNORMER_SIZES),
}


def names() -> list[str]:
    """Every name that ``get`` takes."""
    return [f"{family}-{size}" for family, (_, sizes) in _FAMILIES.items() for size in sizes]


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, for one that ``get`` does not take."""
    if name in names():
        return
    close = difflib.get_close_matches(name, names(), n=3)
    near = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"name is {name!r}; expected a published size such as tnl-385m{near}; "
        "`transnormer info` lists them"
    )


def get(name: str, *, vocab_size: int | None = None) -> DecoderConfig:
    """The configuration behind a name such as ``tnl-385m``; vocab_size None is the published one.

    Raises:
        ValueError: an unknown name.
    """
    family, _, size = name.partition("-")
    check_name(name)
    build, _ = _FAMILIES[family]
    return build(size) if vocab_size is None else build(size, vocab_size=vocab_size)
