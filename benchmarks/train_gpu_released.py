"""The released TransNormerLLM code as a peer of ``train_gpu``, from a folder outside the project.

The folder (``--released DIR``) has a load.py with ``build(shape, attention=...)``: a causal model of
transformers' kind from model_dim, num_layers, heads, glu_dim and vocab_size. "own" is the attention
the code was released with, whose time grows with the square of the length; "lightning2" is the same
code with its authors' Lightning Attention-2 put in; "plain" runs without a GPU.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_gpu_subjects import SIZES, TOY_VOCAB_SIZE, VOCAB_SIZE, MakeUpdate, Row, plain_loop

LENGTHS = (2_048, 8_192, 32_768)
# The better of the two attentions first.
ROWS = tuple(
    Row("released", seq, variant=variant) for variant in ("lightning2", "") for seq in LENGTHS
)


def build_of(folder: Path) -> Callable[..., Any]:
    """``build`` of the folder's load.py."""
    spec = importlib.util.spec_from_file_location("released_load", folder / "load.py")
    if spec is None or spec.loader is None or not (folder / "load.py").is_file():
        raise FileNotFoundError(f"{folder} has no load.py; name the folder of the released code")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


def maker_of(folder: Path) -> MakeUpdate:
    """What builds the update of a row of the released code in a folder."""

    def make(row: Row, *, dry: bool, layers: int | None) -> Callable[[], list[float]]:
        vocab_size = TOY_VOCAB_SIZE if dry else VOCAB_SIZE
        shape = dict(SIZES["toy" if dry else row.size])
        shape |= {"vocab_size": vocab_size, "num_layers": layers or shape["num_layers"]}
        torch.manual_seed(0)
        with torch.device("cpu" if dry else "cuda"):
            model = build_of(folder)(shape, attention="plain" if dry else row.variant or "own")
        model.config.use_cache = False
        return plain_loop(model, row, dry=dry, compiled=False, vocab_size=vocab_size)

    return make
