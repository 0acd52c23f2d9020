"""Where the parts of a store lie, and what must hold before one is created."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.errors import PlanError, StoreError
from fastinterp.store.schema import FORMAT_VERSION, StoreSpec


@dataclass(frozen=True, kw_only=True)
class StorePaths:
    """The zarr itself and ``<zarr>.d`` beside it, which has everything that zarr would not know."""

    zarr: Path

    @classmethod
    def of(cls, path: str | Path) -> "StorePaths":
        """Returns the absolute paths of the store at ``path``."""
        return cls(zarr=Path(os.path.abspath(path)))

    @property
    def side(self) -> Path:
        """The folder of journal, lock and logs."""
        return self.zarr.with_name(self.zarr.name + ".d")

    @property
    def lock(self) -> Path:
        """The file that the one writer holds locked."""
        return self.side / "LOCK"

    @property
    def journal(self) -> Path:
        """The SQLite file."""
        return self.side / "journal.sqlite"

    @property
    def run_json(self) -> Path:
        """Identity, layout and attributes of the run."""
        return self.side / "run.json"

    @property
    def logs(self) -> Path:
        """Folder for the logs of runs."""
        return self.side / "logs"

    @property
    def creating(self) -> Path:
        """The zarr while it is being made; in the side folder, so that nothing is left beside the store."""
        return self.side / "creating.partial"


def megabytes(nbytes: int) -> str:
    """Returns ``nbytes`` for a message, such as ``12.3 MB``."""
    return f"{nbytes / 1e6:,.1f} MB"


def check_parent(paths: StorePaths) -> None:
    """Raises :class:`StoreError` unless the folder that is to hold the store exists and can be written."""
    parent = paths.zarr.parent
    if not parent.is_dir():
        raise StoreError(f"{parent} is no folder: make it first (mkdir -p {parent}), or give another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StoreError(f"{parent} cannot be written: change its permissions, or give another path")


def check_disk(paths: StorePaths, needed: int) -> None:
    """Raises :class:`PlanError` if fewer than ``needed`` bytes are free on the disk of the store."""
    free = shutil.disk_usage(paths.zarr.parent).free
    if free < needed:
        raise PlanError(
            f"{paths.zarr} needs {megabytes(needed)} ({needed} bytes), its disk has {megabytes(free)} free"
            f" ({free} bytes): make room, choose another disk, or write fewer arrays or prompts"
        )


def group_attributes(zarr: Path) -> dict[str, Any]:
    """Returns the attributes of the group at ``zarr``.

    Raises:
        StoreError: it is not a store of fastinterp, or one of a later format.
    """
    refusal = f"{zarr} is not a fastinterp store"
    advice = "give the path of a store, or to start one a path at which there is nothing yet"
    try:
        metadata = json.loads((zarr / "zarr.json").read_text())
        attributes = metadata["attributes"]
        version = attributes["format_version"]
        known = isinstance(attributes["spec_hash"], str) and isinstance(version, int)
    except FileNotFoundError:
        raise StoreError(f"{refusal} (it has no zarr.json): {advice}") from None
    except NotADirectoryError:
        raise StoreError(f"{refusal} but a file: {advice}{_hint(zarr)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{refusal} (its zarr.json has no fastinterp attributes: {error!r}): {advice}") from None
    if not known:
        raise StoreError(f"{refusal} (format_version or spec_hash is of the wrong type): {advice}")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{zarr} has format {version}, this fastinterp reads up to {FORMAT_VERSION}: upgrade fastinterp"
        )
    return dict(attributes)


def _hint(file: Path) -> str:
    """What a file is for that was given in place of a store."""
    if file.suffix.lower() in (".jsonl", ".csv", ".txt", ".parquet"):
        return f" (prompts are scanned with: fastinterp scan --model MODEL --prompts {file} --out run.zarr)"
    return f" (a model is scanned with: fastinterp scan --model {file} ...)" if file.suffix == ".gguf" else ""


def check_side(paths: StorePaths) -> None:
    """Raises :class:`StoreError` if an existing zarr has lost its ``.d`` folder or a part of it."""
    for part in (paths.side, paths.run_json, paths.journal):
        if not part.exists():
            raise StoreError(
                f"{paths.zarr} has no {part.relative_to(paths.zarr.parent)}, so nobody can tell which of its"
                f" blocks are complete: move {paths.side.name} back beside it (the two belong together), or"
                " write to another path; xarray.open_zarr still reads what is there"
            )


def write_run_json(paths: StorePaths, spec: StoreSpec) -> None:
    """Writes ``run.json``; a half-written one never has the final name."""
    partial = paths.run_json.with_name("run.json.partial")
    fields = {"spec_hash": spec.spec_hash, "spec": spec.to_json(), "attrs": dict(spec.attrs)}
    partial.write_text(json.dumps(fields, indent=1))
    partial.replace(paths.run_json)


def read_run_json(paths: StorePaths) -> tuple[dict[str, Any], StoreSpec]:
    """Returns the specification of an existing store, as on disk and rebuilt, or :class:`StoreError`."""
    try:
        fields = json.loads(paths.run_json.read_text())
        return fields["spec"], StoreSpec.from_json(fields["spec"], fields["attrs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(
            f"{paths.run_json} cannot be read ({error!r}): bring it back, or remove {paths.zarr} and"
            f" {paths.side} and start again"
        ) from error
