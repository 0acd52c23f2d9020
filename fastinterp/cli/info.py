"""``fastinterp info``: what a store holds."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastinterp.cli.output import print_json, print_table, say, size
from fastinterp.engine import describe


def info(
    store: Annotated[Path, typer.Argument(help="The store, such as run.zarr.")],
    format: Annotated[Literal["text", "json"], typer.Option(help="What is printed.")] = "text",
) -> None:
    """Show what a store holds, how much of it is done, and what made it."""
    stored = describe(store)
    made_by = {
        key: stored.attrs[key]
        for key in (
            "model",
            "processing",
            "dtype",
            "device",
            "weights_sha256",
            "created",
            "fastinterp_version",
        )
        if key in stored.attrs
    }
    arrays = [
        {"name": a.name, "dims": list(a.dims), "shape": list(a.shape), "dtype": a.dtype, "bytes": a.nbytes}
        for a in stored.arrays
    ]
    if format == "json":
        print_json(
            {
                "store": str(store),
                "complete": stored.complete,
                "prompts": stored.n_prompts,
                "status": dict(stored.status),
                "blocks": stored.n_blocks,
                "blocks_committed": len(stored.committed),
                "arrays": arrays,
                "made_by": made_by,
                "options": stored.attrs.get("options", {}),
            }
        )
        return
    state = "complete" if stored.complete else "not complete: run the same scan again to resume"
    counts = ", ".join(f"{count} {name}" for name, count in stored.status.items() if count)
    say(f"{store}: {state}")
    say(f"{stored.n_prompts} prompts ({counts}), {len(stored.committed)} of {stored.n_blocks} blocks")
    print_table("made by", ("", ""), made_by.items())
    print_table(
        "arrays",
        ("name", "dims", "shape", "dtype", "on disk"),
        [(a.name, ", ".join(a.dims), "x".join(map(str, a.shape)), a.dtype, size(a.nbytes)) for a in stored.arrays],
    )
