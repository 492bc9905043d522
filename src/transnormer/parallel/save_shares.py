"""Whole tensors written by many ranks at once: each writes its pieces to their place in the files.

PyTorch's distributed checkpointing plans and agrees on who writes what; the files are those that one
process writes. All ranks must see the directory; on a network file system it must be one on which
several hosts may write parts of a file (Lustre, GPFS and the like).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from transnormer.files import sync
from transnormer.models import tensor_files
from transnormer.parallel.shares import Share

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Place(NamedTuple):
    """Where a tensor begins: its file, and the byte in it."""

    file: str
    byte: int


def save_shares(
    shares: Mapping[str, Share], folder: Path, stem: str, group: dist.ProcessGroup
) -> None:
    """Write tensors as ``tensor_files.write_tensors`` would write the whole ones.

    Every rank of the group calls it, with the same names; it may run beside the training, in a thread
    of its own, if nothing else uses the group. Files are on the disk when it returns.

    Args:
        shares: what this rank holds, on the host or on a device. A piece that several ranks hold is
            written by one of them; together they must be the whole tensors.
        folder: exists.
        stem: of the files' names.
        group: of all ranks, between hosts' memories (gloo).

    Raises:
        OSError: some rank cannot write, on all ranks.
        ValueError: the pieces are not the whole tensors.
        TypeError: a dtype that files of tensors do not hold.
        RuntimeError: whatever else went wrong on a rank, on all of them.
    """
    for name, share in shares.items():
        if share.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name} is {share.dtype}; expected {known}; convert it")
    try:
        dcp.save(
            dict(shares),
            storage_writer=_Writer(folder, stem, shares),
            planner=_planner(),
            process_group=group,
        )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, OSError):
            raise OSError(f"rank {rank}: {cause}") from error
        kind = ValueError if isinstance(cause, ValueError) else RuntimeError
        raise kind(f"rank {rank}: {cause!r}") from error


def _planner() -> SavePlanner:
    """Plans with an item a piece; who writes what several ranks hold is torch's choice."""
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    return planner


class _Planner(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(name, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(piece.offsets), sizes=piece.values.shape
                    ),
                    properties=TensorProperties(dtype=share.dtype),
                    size=share.shape,
                ),
            )
            for name, share in self.state_dict.items()
            for piece in share.pieces
        ]
        self.plan = SavePlan(items)
        return self.plan


class _Writer(StorageWriter):
    """Writes pieces into files whose headers the coordinator has written."""

    def __init__(self, folder: Path, stem: str, shares: Mapping[str, Share]) -> None:
        self._folder, self._stem, self._shares = folder, stem, shares

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        whole: dict[str, TensorWriteData] = {}
        for plan in plans:
            for item in plan.items:
                assert item.tensor_data is not None
                whole.setdefault(item.index.fqn, item.tensor_data)
        sizes = {name: _bytes(x.size, x.properties.dtype) for name, x in whole.items()}
        groups = tensor_files.dealt_out(sizes)
        names = tensor_files.file_names(self._stem, len(groups))
        places: dict[str, _Place] = {}
        for file, group in zip(names, groups, strict=True):
            places |= _begin(self._folder / file, {name: whole[name] for name in group})
        if len(groups) > 1:
            where = {name: place.file for name, place in places.items()}
            tensor_files.write_index(where, sum(sizes.values()), self._folder, self._stem)
        return [replace(plan, storage_data=places) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places: dict[str, _Place] = plan.storage_data
        by_file: dict[str, list[MetadataIndex]] = {}
        for item in plan.items:
            by_file.setdefault(places[item.index.fqn].file, []).append(item.index)
        results = []
        for file, indices in by_file.items():
            descriptor = os.open(self._folder / file, os.O_WRONLY)
            try:
                for index in indices:
                    size = self._write(descriptor, index, places[index.fqn].byte)
                    results.append(WriteResult(index, size, None))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, descriptor: int, index: MetadataIndex, start: int) -> int:
        share = self._shares[index.fqn]
        offsets = tuple(index.offset or ())
        values = next(p.values for p in share.pieces if p.offsets == offsets)
        data = _as_bytes(values)
        for at, run in _runs(share.shape, offsets, tuple(values.shape)):
            part = data[run.start * values.element_size() : run.stop * values.element_size()]
            byte = start + at * values.element_size()
            while part:
                written = os.pwrite(descriptor, part, byte)
                part, byte = part[written:], byte + written
        return len(data)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The names of the files are on the disk too."""
        sync(self._folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _begin(path: Path, tensors: Mapping[str, TensorWriteData]) -> dict[str, _Place]:
    """Write a safetensors file without its values; where each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    # Wide entries first: every tensor then begins at a multiple of its own width.
    for name in sorted(tensors, key=lambda n: (-tensors[n].properties.dtype.itemsize, n)):
        facts = tensors[name]
        dtype = facts.properties.dtype
        starts[name], end = end, end + _bytes(facts.size, dtype)
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(facts.size),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return {name: _Place(path.name, 8 + len(text) + start) for name, start in starts.items()}


def _as_bytes(values: Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _runs(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[tuple[int, range]]:
    """Entries of a block that follow each other in the whole tensor.

    Yields:
        the first one's place in the whole tensor, and their places in the block.
    """
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    # The innermost cut dim is one run too: what lies behind it is whole.
    outer = max(inner - 1, 0)
    length = math.prod(sizes[outer:])
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    for number, index in enumerate(np.ndindex(*sizes[:outer])):
        at = base + sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield at, range(number * length, (number + 1) * length)
