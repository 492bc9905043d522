"""Directories that load with transformers alone: weights, configuration, and one file of code."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transnormer import files
from transnormer.data.tokenizers import bpe
from transnormer.hf.bundle import Bundle, Rewrite
from transnormer.hf.flatten import Module, Target
from transnormer.infer.text import begin_id
from transnormer.models.checkpoint import CONFIG, write_weights
from transnormer.models.decoder import Decoder
from transnormer.models.directories import replaced

CODE = "modeling_transnormer.py"
_MODULE = CODE.removesuffix(".py")
_MIXERS = "transnormer.nn.token_mixers"
_PLAIN = "transnormer.hf.plain_config"
_MOVED = {"transnormer.config": _PLAIN, "pydantic": _PLAIN}
_MODELING = "transnormer.hf.modeling"
_DEVICES = "transnormer.ops.kernel_devices"
_DOCSTRING = '''"""{names}: a language model of the package transnormer, as one file.

Made from the package's modules by ``transnormer.hf.export``; the mathematics and its sources are in
their docstrings. It needs transformers and torch alone. On a GPU the package itself is faster: this
file holds the forms in PyTorch, not the kernels.
"""

'''
_END = """

register_names(own_layout, TransnormerDecoderModel, {head})
"""


def code(model: Decoder, *, tokenizer: bool = False) -> str:
    """The text of a file that holds what a model's configuration needs.

    Args:
        model: a decoder.
        tokenizer: also the class of SentencePiece tokenizers.
    """
    head = _head(model)
    bundle = Bundle(_MOVED, _rewrites(model))
    bundle.add(Target(_MODELING, head))
    bundle.add(Target(_MODELING, "TransnormerDecoderModel"))
    bundle.add(Target("transnormer.hf.names", "own_layout"))
    bundle.add(Target("transnormer.hf.names", "register_names"))
    if tokenizer:
        bundle.add(Target("transnormer.hf.tokenizer", "BaiChuanTokenizer"))
    return _DOCSTRING.format(names=head) + bundle.text() + _END.format(head=head)


def _head(model: Decoder) -> str:
    return f"TransnormerDecoderFor{'CausalLM' if model.config.causal else 'MaskedLM'}"


def _rewrites(model: Decoder) -> Mapping[Target, Rewrite]:
    mixers = dict.fromkeys(type(b.token_mixer).__name__ for b in model.config.blocks)

    def union(module: Module, statement: ast.stmt) -> str:
        return f"TokenMixerConfig = {' | '.join(mixers)}"

    def no_kernels(module: Module, statement: ast.stmt) -> str:
        return "# This file holds no kernels.\nHAS_TRITON = False"

    def without_triton(module: Module, statement: ast.stmt) -> str:
        assert isinstance(statement, ast.Assign)
        assert isinstance(statement.value, ast.Tuple)
        rows = [module.segment(row) for row in statement.value.elts]
        kept = [row for row in rows if not row.startswith('Implementation("triton"')]
        return "IMPLEMENTATIONS = (\n    " + ",\n    ".join(kept) + ",\n)"

    return {
        Target(_MIXERS, "TokenMixerConfig"): union,
        Target(_DEVICES, "HAS_TRITON"): no_kernels,
        Target("transnormer.ops.linear_attention", "IMPLEMENTATIONS"): without_triton,
    }


def export(model: Decoder, path: str | Path, *, tokenizer: Any = None) -> None:
    """Write a directory that ``from_pretrained(path, trust_remote_code=True)`` loads.

    transnormer need not be installed there; where it is, ``transnormer.load`` reads the directory
    too, and ``import transnormer.hf`` takes the place of its code.

    Args:
        model: any decoder, in its dtype.
        path: the directory; a saved model there is replaced.
        tokenizer: written beside it; any of ``transnormer.data.tokenizers``. In transformers a text
            begins with the token that it begins with here (``begin_id``), where that is a special
            token of the tokenizer, unless add_special_tokens=False says otherwise.

    Raises:
        ValueError: path holds something that is not a saved model.
    """
    with replaced(path) as directory:
        write_weights(model, directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        pieces = (directory / "tokenizer.model").is_file()
        text = code(model, tokenizer=pieces)
        (directory / CODE).write_text(text, encoding="utf-8")
        _name_code(directory, _head(model))
        if tokenizer is not None:
            _begin_texts(directory, model, tokenizer)


def _name_code(directory: Path, head: str) -> None:
    """Say in the directory's configuration which classes of the code belong to it."""
    raw = files.read_json(directory / CONFIG)
    raw["architectures"] = [head]
    raw["auto_map"] = {
        "AutoConfig": f"{_MODULE}.TransnormerDecoderConfig",
        "AutoModel": f"{_MODULE}.TransnormerDecoderModel",
        f"AutoModelFor{head.split('For')[1]}": f"{_MODULE}.{head}",
    }
    files.write_json(raw, directory / CONFIG)


def _begin_texts(directory: Path, model: Decoder, tokenizer: Any) -> None:
    """Let texts begin in transformers with the token that they begin with in ``generate``."""
    known = (model.config.bos_token_id, tokenizer.bos_id, tokenizer.eos_id)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    start = None if all(x is None for x in known) else begin_id(model, tokenizer)
    file, name = directory / "tokenizer_config.json", names.get(start)
    table = files.read_json(file) if file.is_file() else {}
    if name is not None:
        table["bos_token"] = name
    if (directory / "tokenizer.model").is_file():
        table |= {
            "tokenizer_class": "BaiChuanTokenizer",
            "auto_map": {"AutoTokenizer": [f"{_MODULE}.BaiChuanTokenizer", None]},
            "add_bos_token": name is not None,
        }
    elif not (directory / bpe.FILE_NAME).is_file():
        # transformers has no class for what is there.
        return
    elif start is not None and name is not None:
        bpe.add_start(directory, name, start)
    files.write_json(table, file)
