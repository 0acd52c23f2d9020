"""The only place that makes zarr files: creating the group, writing the chunks of a block, checking them."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from fastinterp.errors import StoreError
from fastinterp.store.journal import ChunkRow, CreatedRow, Durability
from fastinterp.store.schema import CHECKSUM_BYTES, FORMAT_VERSION, StoreSpec, fill_value, plain_json

METADATA = "zarr.json"


class RecordingStore(LocalStore):
    """A local store that remembers checksum and size of every file that it wrote.

    Every chunk ends in the crc32c of the bytes before it (the last codec appends it), so the checksum costs
    nothing here. It is this number that the journal keeps, not the crc32c of the whole file: a crc over a
    message and its own crc is one constant for all messages, and would not notice two chunks that changed
    places.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.written: dict[str, tuple[int, int]] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Writes ``value`` (a temporary file, then a rename) and remembers it."""
        await super().set(key, value)
        data = value.as_numpy_array()
        checksum = _trailer(data[-CHECKSUM_BYTES:].tobytes())
        if key.endswith(METADATA):
            checksum = int(google_crc32c.value(value.to_bytes()))
        self.written[key] = (checksum, len(value))


def _trailer(data: bytes) -> int:
    return int.from_bytes(data[-CHECKSUM_BYTES:], "little")


def find_fault(root: Path, row: ChunkRow | CreatedRow, *, read: bool) -> str | None:
    """Returns what is wrong with a file, or None: size by ``stat``, with ``read`` also the checksum."""
    path = root / row.key
    try:
        size = path.stat().st_size
        if size != row.nbytes:
            return f"has {size} bytes, the journal says {row.nbytes}"
        if not read:
            return None
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    body = data
    if not row.key.endswith(METADATA):
        body = data[:-CHECKSUM_BYTES]
        if _trailer(data) != row.crc32c:
            return "is another chunk than the journal says, or its checksum is damaged"
    return None if int(google_crc32c.value(body)) == row.crc32c else "has damaged content (checksum)"


def create_zarr(root: Path, spec: StoreSpec) -> list[CreatedRow]:
    """Writes the group, the metadata of every array and the coordinates; returns the files written."""
    store = RecordingStore(root)
    # As text, because nested attributes do not survive an export to netCDF.
    attributes: dict[str, Any] = {
        **plain_json("attrs", dict(spec.attrs)),
        "format_version": FORMAT_VERSION,
        "spec_hash": spec.spec_hash,
        "spec": json.dumps(spec.to_json()),
    }
    lists = {array.name: spec.coordinate_names(array.dims) for array in spec.arrays if not array.is_coordinate}
    # CF: a data variable lists its coordinates; what no variable can list is listed by the group.
    unlisted = set(spec.coordinate_names()).difference(*lists.values())
    if unlisted:
        attributes["coordinates"] = " ".join(sorted(unlisted))
    group = zarr.create_group(store, attributes=attributes)
    compressors = (ZstdCodec(level=3), Crc32cCodec()) if spec.compress == "zstd" else (Crc32cCodec(),)

    def create(
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: str,
        attrs: Any,
    ) -> zarr.Array[Any]:
        return group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=str if dtype == "str" else dtype,
            fill_value=fill_value(dtype),
            filters=None,
            compressors=compressors,
            dimension_names=dims,
            attributes=attrs,
            config={"write_empty_chunks": True},
        )

    for array in spec.arrays:
        attrs = plain_json("attrs", dict(array.attrs))
        if lists.get(array.name):
            attrs["coordinates"] = " ".join(lists[array.name])
        create(array.name, array.dims, array.shape, spec.chunk_shape(array), array.dtype, attrs)
    for coord in spec.coords:
        shape = coord.array.shape
        create(coord.name, coord.dims, shape, shape, coord.dtype, {})[...] = coord.array
    shape = (spec.n_prompts,)
    create("prompt", ("prompt",), shape, shape, "int64", {})[...] = np.arange(spec.n_prompts)
    with warnings.catch_warnings():
        # zarr says that consolidated metadata is not in the v3 standard yet; readers without it ignore it.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)
    return [CreatedRow(key=key, crc32c=crc, nbytes=size) for key, (crc, size) in sorted(store.written.items())]


class ChunkWriter:
    """Writes the chunk files of whole blocks into an existing zarr; knows nothing of the journal."""

    def __init__(self, root: Path, spec: StoreSpec, durability: Durability) -> None:
        self._root = root
        self._spec = spec
        self._durability = durability
        self._store = RecordingStore(root)
        self._arrays = {array.name: self._open(array.name) for array in spec.arrays}

    def _open(self, name: str) -> zarr.Array[Any]:
        found = zarr.open_array(self._store, path=name, mode="r+")
        # open_array ignores config for an array that exists, and would leave out chunks of nothing but fill.
        metadata: Any = found.metadata
        config: Any = {"write_empty_chunks": True}
        return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=found.store_path, config=config))

    def write(self, block: int, arrays: Mapping[str, NDArray[Any]]) -> list[ChunkRow]:
        """Writes every array of ``block`` and returns one row for each chunk file, ``status`` last.

        Raises:
            OSError: a file could not be written.
            StoreError: zarr wrote other files than the specification says.
        """
        prompts = self._spec.prompts_of(block)
        self._store.written.clear()
        rows = []
        # status comes last: where a reader of a running store sees ok, the other arrays are there.
        for array in sorted(self._spec.arrays, key=lambda array: array.name == "status"):
            self._arrays[array.name][prompts.start : prompts.stop] = arrays[array.name]
            for key in self._spec.chunk_keys(array, block):
                crc, size = self._store.written.pop(f"{array.name}/{key}", (0, 0))
                if not size:
                    raise StoreError(f"zarr wrote no file {array.name}/{key} for block {block}: unknown zarr version?")
                rows.append(ChunkRow(block=block, array=array.name, chunk_key=key, crc32c=crc, nbytes=size))
        if self._store.written:
            raise StoreError(f"zarr wrote unexpected files for block {block}: {', '.join(self._store.written)}")
        if self._durability == "power":
            sync_files(self._root, [row.key for row in rows])
        return rows


def sync_files(root: Path, keys: Iterable[str]) -> None:
    """Forces files and every directory between them and ``root`` (included) to the disk."""
    directories = {root}
    for key in keys:
        path = root / key
        _sync(path)
        directories.update(parent for parent in path.parents if parent.is_relative_to(root))
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
