"""A model's directory appears whole or not at all, and replaces nothing but a saved model."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transnormer import files

# What a saved model's directory may hold; anything else in it is somebody's and is not replaced.
_OWN_FILES = re.compile(
    r"config\.json|model.*\.safetensors|model\.safetensors\.index\.json|(byte_)?tokenizer.*|"
    # What transformers, and the export for it, put beside a model.
    r"modeling_transnormer\.py|generation_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.jinja|.*\.tiktoken|"
    # What exports of a step and cards of models are.
    r"model\.onnx(\.data)?|state\.npz|README\.md"
)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """An empty directory to write into, which takes the place of ``path`` if the block ends well.

    Raises:
        ValueError: path holds something that is not a saved model.
    """
    # A link stays a link: what it points to is replaced.
    target = Path(path).resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        files.sync(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if target.is_dir():
        strangers = sorted(p.name for p in target.iterdir() if not _OWN_FILES.fullmatch(p.name))
        if strangers:
            raise ValueError(
                f"{target} holds {strangers[0]}; expected a saved model or an empty directory; "
                "choose another path"
            )
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target} is a file; expected a directory; choose another path")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename over target; a directory with files has to step aside first."""
    if target.is_dir() and any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(aside)
        temporary.replace(target)
        shutil.rmtree(aside)
    else:
        temporary.replace(target)
    files.sync(target.parent)
