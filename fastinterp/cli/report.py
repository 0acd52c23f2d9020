"""``fastinterp report``: a store as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from fastinterp.cli.output import say
from fastinterp.engine import open as open_dataset
from fastinterp.report import write_html


def report(
    store: Annotated[Path, typer.Argument(help="The store, such as run.zarr.")],
    html: Annotated[Path, typer.Option(help="The page to write.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    max_prompts: Annotated[int, typer.Option(help="Prompts listed on the page; means are over all.")] = 200,
) -> None:
    """Write head heat maps, the strongest heads and the prompts as one HTML file that needs no network."""
    path = write_html(open_dataset(store), html, title=title, max_prompts=max_prompts)
    say(str(path))
