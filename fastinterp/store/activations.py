"""A cache of activations on disk: one flat zarr group, an array with named axes for each hook name."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from fastinterp.errors import StoreError
from fastinterp.store.paths import StorePaths, check_parent
from fastinterp.store.schema import MAX_ACTIVATION_CHUNK, plain_json

ACTIVATIONS_VERSION = 1
"""Version of this layout; the group's attribute ``fastinterp_activations``."""


@dataclass(frozen=True, kw_only=True)
class StoredActivation:
    """One activation. ``torch_dtype`` is what it was in torch, where ``values`` cannot say it (bfloat16)."""

    name: str
    dims: tuple[str, ...]
    values: NDArray[Any]
    torch_dtype: str


def write_activations(
    path: str | Path, arrays: Iterable[StoredActivation], attrs: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes activations to ``path``, taking one after the other; a half-written group never has the final name.

    An axis whose size differs from what an earlier array has under the same name gets a name of its own, so that
    xarray can open them as one dataset.

    Raises:
        StoreError: something is at ``path`` (with ``overwrite``: something else than such a group), its folder is
            missing or not writable, or a name cannot be one of zarr.
    """
    target = StorePaths.of(path).zarr
    check_parent(StorePaths.of(path))
    if os.path.lexists(target):
        if not overwrite:
            raise StoreError(f"{target} exists already: give another path, or overwrite=True")
        _attributes(target)  # only what this function wrote may be removed
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    try:
        _write(partial, arrays, attrs)
        if os.path.lexists(target):
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def read_activations(path: str | Path) -> tuple[dict[str, Any], Iterator[StoredActivation]]:
    """Returns the attributes and, one after the other, the activations in the order in which they were written.

    Raises:
        StoreError: nothing is at ``path``, or it was not written by :func:`write_activations`.
    """
    root = StorePaths.of(path).zarr
    if not root.exists():
        raise StoreError(f"there are no activations at {root}: give the path that was given to ActivationCache.save")
    attributes = _attributes(root)
    names = attributes.pop("names")

    def arrays() -> Iterator[StoredActivation]:
        group = zarr.open_group(LocalStore(root, read_only=True), mode="r")
        for name in names:
            array = group[name]
            assert isinstance(array, zarr.Array)
            metadata: Any = array.metadata
            yield StoredActivation(
                name=name,
                dims=tuple(metadata.dimension_names or ()),
                values=np.asarray(array[...]),
                torch_dtype=str(array.attrs["torch_dtype"]),
            )

    return attributes, arrays()


def _write(root: Path, arrays: Iterable[StoredActivation], attrs: Mapping[str, Any]) -> None:
    store = LocalStore(root)
    group = zarr.create_group(store, attributes={"fastinterp_activations": ACTIVATIONS_VERSION})
    sizes: dict[str, int] = {}
    names: list[str] = []
    for array in arrays:
        if not array.name or "/" in array.name or array.name.startswith("__") or set(array.name) == {"."}:
            raise StoreError(f"activation name {array.name!r} cannot be written: it must be a name without '/'")
        values = array.values
        dims = [
            dim if sizes.setdefault(dim, size) == size else f"{array.name}.axis_{axis}"
            for axis, (dim, size) in enumerate(zip(array.dims, values.shape, strict=True))
        ]
        created = group.create_array(
            array.name,
            shape=values.shape,
            chunks=_chunks(values),
            dtype=values.dtype,
            fill_value=np.nan if values.dtype.kind == "f" else 0,
            filters=None,
            compressors=(Crc32cCodec(),),
            dimension_names=dims,
            attributes={"torch_dtype": array.torch_dtype},
            config={"write_empty_chunks": True},
        )
        created[...] = values
        names.append(array.name)
    group.attrs.update(plain_json("attrs", {**attrs, "names": names}))
    with warnings.catch_warnings():
        # zarr says that consolidated metadata is not in the v3 standard yet; readers without it ignore it.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)


def _chunks(values: NDArray[Any]) -> tuple[int, ...]:
    """Whole rows of the first axis, so many that a chunk is not larger than others in a store."""
    if not values.ndim:
        return ()
    rest = tuple(max(1, size) for size in values.shape[1:])
    row = int(np.prod(rest, dtype=np.int64)) * values.itemsize
    return (max(1, min(len(values), MAX_ACTIVATION_CHUNK // row)), *rest)


def _attributes(root: Path) -> dict[str, Any]:
    """The attributes of a group of activations, or :class:`StoreError`."""
    try:
        attributes = json.loads((root / "zarr.json").read_text())["attributes"]
        version, names = attributes["fastinterp_activations"], attributes["names"]
        known = isinstance(version, int) and isinstance(names, list)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise StoreError(
            f"{root} holds no activations of fastinterp: give the path that was given to ActivationCache.save "
            "(fastinterp.open reads the store of a scan)"
        )
    if version > ACTIVATIONS_VERSION:
        raise StoreError(f"{root} has format {version}, this fastinterp reads up to {ACTIVATIONS_VERSION}: upgrade it")
    return dict(attributes)
