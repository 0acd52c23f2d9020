"""Reading the metadata of a GGUF file once per load: ``transformers`` would parse it anew for every part it wants."""

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LOCK = threading.Lock()


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """``gguf.GGUFReader`` with the same fields and tensors, quick at the tokenizer's long arrays.

    The library makes several views of a ``numpy.memmap`` for each of some 150000 strings and numbers, and a view of
    one costs far more than a view of an array. Where the library changes what is overridden here, it is slow again.
    """

    @property
    def data(self) -> Any:
        """The bytes of the file, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> tuple[Any, list[Any], list[int], list[Any]]:
        if raw_type == gguf.GGUFValueType.ARRAY and self.byte_order == "I":
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            item, n = gguf.GGUFValueType(head[0][0]), int(head[1][0])
            start, types = orig_offs + 12, [gguf.GGUFValueType.ARRAY, item]
            if n and item in self.gguf_scalar_to_np:
                values = self._get(start, self.gguf_scalar_to_np[item], n)
                return 12 + values.nbytes, [*head, *values.reshape(n, 1)], list(range(2, n + 2)), types
            if n and item == gguf.GGUFValueType.STRING:
                size, strings = self._strings(start, n)
                return 12 + size, [*head, *strings], list(range(3, 2 * n + 2, 2)), types
        field: tuple[Any, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return field

    def _strings(self, start: Any, n: int) -> tuple[Any, list[Any]]:
        """Returns the size of ``n`` strings in the file, and for each its length and its bytes."""
        at, length_of = start, struct.Struct("=Q").unpack_from
        parts: list[Any] = []
        for _ in range(n):
            (length,) = length_of(self._data, at)
            end = at + 8 + length
            if end > len(self._data):
                raise ValueError("the file breaks off within its metadata")
            parts += (self._data[at : at + 8].view(np.uint64), self._data[at + 8 : end])
            at = end
        return at - start, parts


@contextmanager
def read_once(path: Path) -> Iterator[Reader]:
    """Yields a reader of the file, which within the block is also what ``transformers`` gets when it opens it.

    ``transformers`` takes no reader, so the library's class is replaced for the time being: for this path only, other
    files are opened as ever. Blocks of several threads wait for each other.
    """
    with _LOCK:
        reader, original = Reader(path), gguf.GGUFReader

        def open_reader(other: Any, *args: Any, **options: Any) -> Any:
            same = not args and not options and Path(other).resolve() == path.resolve()
            return reader if same else original(other, *args, **options)

        gguf.GGUFReader = open_reader
        try:
            yield reader
        finally:
            gguf.GGUFReader = original
