"""Reading and writing the weight files of a directory: safetensors or .bin, whole or sharded."""

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transnormer.files import read_json, sha256, sync, write_json

SINGLE, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 5 * 2**30
# Rows start to end of a tensor that no shard can hold whole, as "embedding.weight[0:8192]".
_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]")


class StoredTensor(NamedTuple):
    """A tensor as read, and the file it came from (for messages)."""

    tensor: Tensor
    file: Path


def has_weights(directory: Path) -> bool:
    """True if the directory holds weights in one of the four known forms."""
    return any((directory / n).is_file() for n in (SINGLE, SHARD_INDEX, BIN_SINGLE, BIN_INDEX))


def hashes(directory: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file with weights, by its name."""
    return {file.name: sha256(file) for file in sorted(directory.glob("model*.safetensors"))}


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read all weights of a directory, on the CPU, in their stored dtypes.

    The forms are looked for in this order: one safetensors file, sharded safetensors with their
    index, one .bin file, sharded .bin files with their index. Pickles are read with
    ``weights_only=True``: no code of theirs runs.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is absent.
        ValueError: a damaged file, or an index that does not agree with its shards (both named).
    """
    if (directory / SINGLE).is_file():
        return _stored(directory / SINGLE)
    if (directory / SHARD_INDEX).is_file():
        return _read_shards(directory / SHARD_INDEX)
    if (directory / BIN_SINGLE).is_file():
        return _stored(directory / BIN_SINGLE)
    if (directory / BIN_INDEX).is_file():
        return _read_shards(directory / BIN_INDEX)
    raise FileNotFoundError(
        f"{directory} holds no weights; expected {SINGLE}, {SHARD_INDEX}, {BIN_SINGLE} or "
        f"{BIN_INDEX}; check the path"
    )


def write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    cut_rows: bool = False,
    stem: str = "model",
) -> list[Path]:
    """Write tensors as safetensors, in several files with an index where they exceed shard_bytes.

    Every file is on the disk when this returns.

    Args:
        tensors: by name.
        directory: where to.
        shard_bytes: the most of tensors in one file; a larger tensor has a file of its own.
        cut_rows: cut larger tensors into rows instead. ``read_tensors`` joins them again; other
            packages do not.
        stem: what the files' names begin with.

    Returns:
        the weight files, without the index.

    Raises:
        OSError: a file cannot be written; it is named.
    """
    if cut_rows:
        tensors = _cut(tensors, shard_bytes)
    groups = dealt_out({name: x.nbytes for name, x in tensors.items()}, shard_bytes)
    names = file_names(stem, len(groups))
    for file, group in zip(names, groups, strict=True):
        shard = {name: tensors[name].detach().contiguous() for name in group}
        _write_safetensors(shard, directory / file)
    if len(groups) > 1:
        where = {key: file for file, group in zip(names, groups, strict=True) for key in group}
        write_index(where, sum(x.nbytes for x in tensors.values()), directory, stem)
    return [directory / name for name in names]


def dealt_out(sizes: Mapping[str, int], most: int = SHARD_BYTES) -> list[list[str]]:
    """Names in their order, for one file or for several that hold at most so many bytes each.

    A larger tensor has a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(sizes):
        if groups[-1] and size + sizes[name] > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += sizes[name]
    return groups


def file_names(stem: str, count: int) -> list[str]:
    """What one file, or each of several, is called."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(where: Mapping[str, str], total: int, directory: Path, stem: str) -> None:
    """Write the index of several files: which tensor is in which, and their bytes in all."""
    index = directory / f"{stem}.safetensors.index.json"
    write_json({"metadata": {"total_size": total}, "weight_map": dict(where)}, index)


class OpenTensors(Mapping[str, Any]):
    """Tensors that are read when they are sliced, so that a part of one costs no more than it is.

    A value is safetensors' slice: ``x[...]``, ``x[rows, columns]`` and ``x.get_shape()``; of a tensor
    without dims it is the tensor.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Open safetensors files; their names must differ.

        Raises:
            ValueError: a damaged file.
        """
        self._where: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt", device="cpu").__enter__()
            except SafetensorError as error:
                raise _damaged(path, error) from error
            self._where |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Any:
        found = self._where[name].get_slice(name)
        return found if found.get_shape() else self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_tensors(directory: Path, stem: str) -> OpenTensors:
    """Open what ``write_tensors`` wrote under a stem.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a damaged file.
    """
    single = directory / f"{stem}.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob(f"{stem}-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no {single.name}; expected it; check the path")
    return OpenTensors(files)


def _cut(tensors: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """The same tensors, those of more bytes than ``most`` as groups of rows."""
    cut = {}
    for name, tensor in tensors.items():
        if tensor.nbytes <= most or tensor.dim() == 0:
            cut[name] = tensor
            continue
        rows = max(most * tensor.shape[0] // tensor.nbytes, 1)
        for start in range(0, tensor.shape[0], rows):
            part = tensor[start : start + rows]
            # A slice would share its memory, which one file alone may have.
            cut[f"{name}[{start}:{start + part.shape[0]}]"] = part.clone()
    return cut


def _joined(found: dict[str, StoredTensor], index: Path) -> dict[str, StoredTensor]:
    """Tensors whole again that were cut into rows; ValueError where rows are missing."""
    whole: dict[str, StoredTensor] = {}
    parts: dict[str, dict[int, tuple[int, StoredTensor]]] = defaultdict(dict)
    for name, stored in found.items():
        match = _ROWS.fullmatch(name)
        if match is None:
            whole[name] = stored
        else:
            parts[match[1]][int(match[2])] = (int(match[3]), stored)
    for name, rows in parts.items():
        end, tensors = 0, []
        for start in sorted(rows):
            stop, stored = rows[start]
            if start != end or stop - start != len(stored.tensor):
                raise ValueError(
                    f"{index} has the rows {start} to {stop} of {name} behind row {end}; expected "
                    "each row once; copy the files again"
                )
            end = stop
            tensors.append(stored.tensor)
        whole[name] = StoredTensor(torch.cat(tensors), rows[0][1].file)
    return whole


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(
            f"{path} cannot be written: {error}; expected room on the disk; free some, or choose "
            "another place"
        ) from error
    sync(path)


def _stored(path: Path) -> dict[str, StoredTensor]:
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    return {name: StoredTensor(tensor, path) for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is damaged: {error}; expected a safetensors file; copy it again")


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged or holds more than tensors: {reason}; expected a dictionary of "
            "tensors; copy it again"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a dictionary of tensors")
    return {str(name): tensor for name, tensor in data.items()}


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map; expected a table from tensor to file")
    suffix = ".bin" if index.name == BIN_INDEX else ".safetensors"
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(map(str, where.values()))):
        if Path(name).name != name or not name.endswith(suffix):
            raise ValueError(f"{index} names the file {name!r}; expected *{suffix} beside it")
        path = index.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is absent; expected it, as {index} names it")
        for tensor, stored in _stored(path).items():
            if where.get(tensor) != name:
                raise ValueError(
                    f"{path} holds {tensor}, which {index.name} places in "
                    f"{where.get(tensor, 'no file')}; expected the two to agree"
                )
            found[tensor] = stored
    for tensor, name in where.items():
        if tensor not in found:
            raise ValueError(f"{index.parent / name} lacks {tensor}; expected it, as {index} says")
    return _joined(found, index)
