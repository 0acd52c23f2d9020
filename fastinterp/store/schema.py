"""What a store holds, decided before the first prompt is computed: arrays, coordinates, blocks, identity."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastinterp.errors import StoreError, check_choice

FORMAT_VERSION = 1
"""Version of the layout on disk; raised when an older fastinterp could not read what this one writes."""

STATUS_CODES: dict[str, int] = {"pending": 0, "ok": 1, "failed": 2, "rejected": 3}
"""Meaning of the ``status`` array; a committed block has no ``pending`` prompt."""

DType = Literal["float32", "float16", "int32", "uint8", "str"]
Kind = Literal["result", "activation", "prompt"]
Compress = Literal["none", "zstd"]

MEGABYTE = 1 << 20
MAX_ACTIVATION_CHUNK = 16 * MEGABYTE
# The four bytes that the crc32c codec appends to every chunk.
CHECKSUM_BYTES = 4
# Disk is planned before the texts are read; a prompt of 256 UTF-8 bytes is a long sentence.
PLANNED_STRING_BYTES = 256

_FILL: dict[str, float | int | str] = {
    "float32": math.nan,
    "float16": math.nan,
    "int32": -1,
    "int64": -1,
    "uint8": 0,
    "str": "",
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# xarray gives these a meaning of its own and would change values or move the attribute away on reading.
_RESERVED_ATTRS = frozenset(
    {"_FillValue", "missing_value", "scale_factor", "add_offset", "coordinates", "dtype"}
    | {"calendar", "grid_mapping", "bounds"}
)
_TIME_UNITS = re.compile(r"(days|hours|minutes|seconds|milliseconds|microseconds|nanoseconds)( since .*)?")


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"{what} name {name!r} is not allowed in a store: use letters, digits and underscores,"
            f" starting with a letter (no dots: 'resid_post_5' or a layer axis instead of 'resid_post.5')"
        )


def plain_json(what: str, value: Any) -> Any:
    """Returns ``value`` as it comes back from JSON; raises :class:`StoreError` where JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} cannot be written as JSON ({error}): use str, int, float, list, dict") from None


def fill_value(dtype: str) -> float | int | str:
    """Returns the fill value: NaN for floats, -1 for integers, 0 for ``uint8``, empty for strings."""
    return _FILL[dtype]


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array with a prompt axis: ``shape[0]`` is the number of prompts and ``dims[0]`` is ``"prompt"``.

    ``dtype="str"`` is a zarr string. ``kind="activation"`` may be chunked along later axes as well,
    ``"result"`` and ``"prompt"`` never are. Missing values are NaN (floats), -1 (``int32``), 0 (``uint8``)
    and ``""`` (strings). String arrays of kind ``"prompt"`` are coordinates when xarray opens the store.

    Raises:
        StoreError: a name with a dot, dims that do not start with ``prompt``, reserved attributes.

    Example:
        >>> ArraySpec(name="direct_effect", dims=("prompt", "layer", "head"), shape=(100, 12, 12),
        ...           dtype="float32", attrs={"units": "logits"}, kind="result").fill_value
        nan
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType
    attrs: Mapping[str, Any]
    kind: Kind

    def __post_init__(self) -> None:
        _check_name("array", self.name)
        check_choice("dtype", self.dtype, _FILL.keys() - {"int64"})
        check_choice("kind", self.kind, ("result", "activation", "prompt"))
        for dim in self.dims:
            _check_name("dimension", dim)
        if self.dims[:1] != ("prompt",) or len(set(self.dims)) != len(self.dims):
            raise StoreError(f"array {self.name!r} has dims {self.dims}: the first must be 'prompt', each only once")
        if len(self.shape) != len(self.dims) or min(self.shape) < 1:
            raise StoreError(
                f"array {self.name!r} has shape {self.shape}: expected {len(self.dims)} sizes of at least 1"
                f" for dims {self.dims}"
            )
        reserved = _RESERVED_ATTRS & set(self.attrs)
        if reserved:
            raise StoreError(f"array {self.name!r} has reserved attributes {sorted(reserved)}: rename them")
        units = self.attrs.get("units")
        if isinstance(units, str) and _TIME_UNITS.fullmatch(units):
            raise StoreError(
                f"array {self.name!r} has units {units!r}, which xarray would decode to time deltas:"
                " put the unit into the name (wall_seconds) and leave the attribute out"
            )
        plain_json(f"attrs of array {self.name!r}", dict(self.attrs))

    @property
    def fill_value(self) -> float | int | str:
        """What a reader sees where nothing was written."""
        return fill_value(self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of one element; for strings the planning figure of 256."""
        return PLANNED_STRING_BYTES if self.dtype == "str" else np.dtype(self.dtype).itemsize

    @property
    def is_coordinate(self) -> bool:
        """Whether xarray is told to make it a coordinate (the texts and ids of the prompts)."""
        return self.kind == "prompt" and self.dtype == "str"


@dataclass(frozen=True, kw_only=True, eq=False)
class CoordSpec:
    """A coordinate without a prompt axis (``layer``, ``head``, ``pos``, ``head_label``), integers or strings.

    ``values`` is an array or a nested list with one axis for each of ``dims``. The ``prompt`` coordinate
    (0, 1, ...) is made by the store itself.

    Raises:
        StoreError: values that are neither integers nor strings, or of another rank than ``dims``.

    Example:
        >>> CoordSpec(name="head_label", dims=("layer", "head"), values=[["L0H0", "L0H1"]]).array.shape
        (1, 2)
    """

    name: str
    dims: tuple[str, ...]
    values: Sequence[Any] | NDArray[Any]

    def __post_init__(self) -> None:
        _check_name("coordinate", self.name)
        for dim in self.dims:
            _check_name("dimension", dim)
        if not self.dims or "prompt" in self.dims or len(set(self.dims)) != len(self.dims):
            raise StoreError(
                f"coordinate {self.name!r} has dims {self.dims}: expected one or more different dims, without"
                " 'prompt' (what has a prompt axis is an ArraySpec of kind 'prompt')"
            )
        given = np.asarray(self.values)
        if given.ndim != len(self.dims) or given.size == 0:
            raise StoreError(f"coordinate {self.name!r} has values of shape {given.shape} for dims {self.dims}")
        strings = all(isinstance(value, str) for value in given.ravel().tolist())
        if not strings and given.dtype.kind not in "iu":
            raise StoreError(f"coordinate {self.name!r} has {given.dtype} values: expected integers or strings")

    @property
    def array(self) -> NDArray[Any]:
        """The values as int64, or as an object array of ``str``."""
        given = np.asarray(self.values)
        return given.astype(np.int64 if given.dtype.kind in "iu" else object)

    @property
    def dtype(self) -> Literal["int64", "str"]:
        """The zarr dtype."""
        return "int64" if np.asarray(self.values).dtype.kind in "iu" else "str"


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreSpec:
    """The whole store: every array, coordinate and attribute, and what must be equal for a run to be resumed.

    ``attrs`` become group attributes and may differ between a run and its resumption (creation time, host);
    ``identity`` may not. ``block_size`` prompts are written and committed together.

    Raises:
        StoreError: names used twice, one dim with two sizes, a block size outside of ``1 .. n_prompts``.

    Example:
        >>> spec = StoreSpec(n_prompts=10, block_size=4, arrays=(status_array(10),), coords=(), attrs={},
        ...                  identity={"model": "gpt2"})
        >>> spec.n_blocks, spec.prompts_of(2)
        (3, range(8, 10))
    """

    n_prompts: int
    block_size: int
    arrays: Sequence[ArraySpec]
    coords: Sequence[CoordSpec]
    attrs: Mapping[str, Any]
    identity: Mapping[str, Any]
    compress: Compress = "none"

    def __post_init__(self) -> None:
        check_choice("compress", self.compress, ("none", "zstd"))
        if self.n_prompts < 1 or not 1 <= self.block_size <= self.n_prompts:
            raise StoreError(
                f"block_size={self.block_size} for {self.n_prompts} prompts: expected 1 to n_prompts"
                " (choose_block_size() chooses one)"
            )
        if not self.arrays:
            raise StoreError("a store needs at least one array with a prompt axis")
        names = ["prompt", *(array.name for array in self.arrays), *(coord.name for coord in self.coords)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StoreError(f"names used more than once in the store: {', '.join(twice)} ('prompt' is made by itself)")
        sizes = {"prompt": self.n_prompts}
        shapes = [(array.name, array.dims, array.shape) for array in self.arrays]
        shapes += [(coord.name, coord.dims, coord.array.shape) for coord in self.coords]
        for name, dims, shape in shapes:
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise StoreError(f"{name!r} has {size} along {dim!r}, elsewhere it is {sizes[dim]}")
        for name, dims, _ in shapes:
            if name in sizes and dims != (name,):
                raise StoreError(f"{name!r} is the name of a dimension: only a coordinate with dims=({name!r},) has it")
        plain_json("attrs", dict(self.attrs))
        plain_json("identity", dict(self.identity))
        reserved = {"format_version", "spec_hash", "spec", "coordinates"} & set(self.attrs)
        if reserved:
            raise StoreError(f"group attributes {sorted(reserved)} are written by the store itself: leave them out")

    @property
    def n_blocks(self) -> int:
        """Number of commit units."""
        return -(-self.n_prompts // self.block_size)

    def prompts_of(self, block: int) -> range:
        """Returns the prompt numbers of ``block``; the last block may have fewer than ``block_size``."""
        if not 0 <= block < self.n_blocks:
            raise StoreError(f"block {block} is out of range: the store has {self.n_blocks} (0 to {self.n_blocks - 1})")
        start = block * self.block_size
        return range(start, min(start + self.block_size, self.n_prompts))

    def array(self, name: str) -> ArraySpec:
        """Returns the array called ``name``."""
        return next(array for array in self.arrays if array.name == name)

    def chunk_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Returns the chunk: a block of prompts, other axes whole; activations split to 4 to 16 MB."""
        chunk = [self.block_size, *array.shape[1:]]
        if array.kind != "activation":
            return tuple(chunk)
        for axis in range(1, len(chunk)):
            # Bytes of the chunk if this axis were cut down to 1; what was left of it is spread evenly.
            slab = math.prod(chunk) // chunk[axis] * array.itemsize
            most = max(1, MAX_ACTIVATION_CHUNK // slab)
            if chunk[axis] > most:
                chunk[axis] = -(-chunk[axis] // -(-chunk[axis] // most))
        return tuple(chunk)

    def chunk_keys(self, array: ArraySpec, block: int) -> Iterator[str]:
        """Yields the keys (``c/<block>/0/...``) of the chunk files of ``block`` of ``array``."""
        chunk = self.chunk_shape(array)
        counts = [range(-(-size // step)) for size, step in zip(array.shape[1:], chunk[1:], strict=True)]
        for later in itertools.product(*counts):
            yield "/".join(["c", str(block), *map(str, later)])

    def nbytes(self) -> int:
        """Returns the bytes of all chunk files when complete, uncompressed; strings count 256 bytes each."""
        total = 8 * self.n_prompts + sum(coord.array.size * 8 for coord in self.coords)
        for array in self.arrays:
            chunks = sum(1 for _ in self.chunk_keys(array, 0)) * self.n_blocks
            total += chunks * (math.prod(self.chunk_shape(array)) * array.itemsize + CHECKSUM_BYTES)
        return total

    def coordinate_names(self, dims: Sequence[str] | None = None) -> list[str]:
        """Returns the coordinates that are no index, all or those that fit ``dims``: CF wants them listed."""
        known = [(array.name, array.dims) for array in self.arrays if array.is_coordinate]
        known += [(coord.name, coord.dims) for coord in self.coords]
        fitting = [(name, of) for name, of in known if dims is None or set(of) <= set(dims)]
        return [name for name, of in fitting if of != (name,)]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but ``attrs`` as JSON types: what resuming compares."""
        arrays = {
            array.name: {
                "dims": array.dims,
                "shape": array.shape,
                "dtype": array.dtype,
                "attrs": dict(array.attrs),
                "kind": array.kind,
            }
            for array in self.arrays
        }
        coords = {coord.name: {"dims": coord.dims, "values": coord.array.tolist()} for coord in self.coords}
        fields = {
            "format_version": FORMAT_VERSION,
            "n_prompts": self.n_prompts,
            "block_size": self.block_size,
            "compress": self.compress,
            "identity": dict(self.identity),
            "arrays": arrays,
            "coords": coords,
        }
        return dict(plain_json("the specification", fields))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], attrs: Mapping[str, Any]) -> "StoreSpec":
        """Returns the spec that :meth:`to_json` described, with the group attributes that go with it."""
        arrays = [
            ArraySpec(
                name=name,
                dims=tuple(array["dims"]),
                shape=tuple(array["shape"]),
                dtype=array["dtype"],
                attrs=array["attrs"],
                kind=array["kind"],
            )
            for name, array in fields["arrays"].items()
        ]
        coords = [
            CoordSpec(name=name, dims=tuple(coord["dims"]), values=coord["values"])
            for name, coord in fields["coords"].items()
        ]
        return cls(
            n_prompts=fields["n_prompts"],
            block_size=fields["block_size"],
            arrays=arrays,
            coords=coords,
            attrs=attrs,
            identity=fields["identity"],
            compress=fields["compress"],
        )

    @property
    def spec_hash(self) -> str:
        """sha256 of the identity and of everything that decides the layout."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def status_array(n_prompts: int) -> ArraySpec:
    """Returns the ``status`` array that every scan has: 0 pending, 1 ok, 2 failed, 3 rejected."""
    attrs = {
        "long_name": "state of the prompt",
        "flag_values": list(STATUS_CODES.values()),
        "flag_meanings": " ".join(STATUS_CODES),
    }
    return ArraySpec(name="status", dims=("prompt",), shape=(n_prompts,), dtype="uint8", attrs=attrs, kind="prompt")
