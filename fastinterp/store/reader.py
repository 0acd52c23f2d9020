"""Reading a store: as an xarray Dataset, or as a summary that also knows which blocks are committed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from fastinterp.errors import StoreError
from fastinterp.store.journal import Journal
from fastinterp.store.paths import StorePaths, check_side, group_attributes, read_run_json


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One array of a store; ``nbytes`` are the bytes on disk of its committed chunks."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store holds by now; ``status`` counts prompts by state, from the journal."""

    path: Path
    n_prompts: int
    n_blocks: int
    block_size: int
    committed: frozenset[int]
    status: Mapping[str, int]
    arrays: tuple[ArrayInfo, ...]
    attrs: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every block is committed."""
        return len(self.committed) == self.n_blocks


def open_store(path: str | Path) -> xr.Dataset:
    """Opens a store lazily; the same as ``xarray.open_zarr(path)``, whose dask chunks are the chunks on disk.

    What was not computed yet reads as NaN (floats), -1 (integers) and an empty text; ``status`` is 0 there.

    Raises:
        StoreError: nothing is at ``path``, or it is not a store of fastinterp.

    Example:
        >>> open_store("run.zarr").direct_effect.mean("prompt")  # doctest: +SKIP
    """
    paths = _existing(path)
    dataset: xr.Dataset = xr.open_zarr(paths.zarr)
    return dataset


def describe_store(path: str | Path) -> StoreInfo:
    """Describes a store without reading its arrays, also while it is being written.

    Raises:
        StoreError: nothing is at ``path``, it is not a store of fastinterp, or its ``.d`` folder is gone.

    Example:
        >>> describe_store("run.zarr").complete  # doctest: +SKIP
        True
    """
    paths = _existing(path)
    check_side(paths)
    _, spec = read_run_json(paths)
    journal = Journal.open(paths.journal)
    try:
        blocks = journal.blocks()
        nbytes = journal.bytes_by_array()
    finally:
        journal.close()
    done = sum(len(spec.prompts_of(row.block)) for row in blocks)
    return StoreInfo(
        path=paths.zarr,
        n_prompts=spec.n_prompts,
        n_blocks=spec.n_blocks,
        block_size=spec.block_size,
        committed=frozenset(row.block for row in blocks),
        status={
            "pending": spec.n_prompts - done,
            "ok": sum(row.ok for row in blocks),
            "failed": sum(row.failed for row in blocks),
            "rejected": sum(row.rejected for row in blocks),
        },
        arrays=tuple(
            ArrayInfo(
                name=array.name,
                dims=array.dims,
                shape=array.shape,
                dtype=array.dtype,
                nbytes=nbytes.get(array.name, 0),
            )
            for array in spec.arrays
        ),
        attrs=dict(spec.attrs),
        identity=dict(spec.identity),
    )


def _existing(path: str | Path) -> StorePaths:
    paths = StorePaths.of(path)
    if not paths.zarr.exists():
        begun = paths.side.is_dir()
        raise StoreError(
            f"there is no store at {paths.zarr}"
            + (f" (only {paths.side.name}: its creation was cut off, run the same command again)" if begun else "")
            + ": give the path that was given to 'fastinterp scan -o', such as run.zarr"
        )
    group_attributes(paths.zarr)
    return paths
