"""The store on disk: a zarr that xarray opens, a journal that makes it resumable."""

from fastinterp.store.begin import check_target
from fastinterp.store.blocks import choose_block_size
from fastinterp.store.reader import ArrayInfo, StoreInfo, describe_store, open_store
from fastinterp.store.schema import (
    FORMAT_VERSION,
    STATUS_CODES,
    ArraySpec,
    CoordSpec,
    StoreSpec,
    status_array,
)
from fastinterp.store.writer import StoreWriter

__all__ = [
    "FORMAT_VERSION",
    "STATUS_CODES",
    "ArrayInfo",
    "ArraySpec",
    "CoordSpec",
    "StoreInfo",
    "StoreSpec",
    "StoreWriter",
    "check_target",
    "choose_block_size",
    "describe_store",
    "open_store",
    "status_array",
]
