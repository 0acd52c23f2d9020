"""Puts the subcommands together, and turns errors raised on purpose into a message and an exit status."""

import sys
import warnings
from typing import Any

import typer

import fastinterp
from fastinterp.cli import demo, info, report, scan, tasks
from fastinterp.cli.interrupt import Interrupted
from fastinterp.errors import AnswerSpaceWarning, FastinterpError

app = typer.Typer(
    name="fastinterp",
    help="A batch engine for mechanistic interpretability: from a prompt file and a model to a zarr store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("scan")(scan.scan)
app.command("info")(info.info)
app.command("report")(report.report)
app.command("tasks")(tasks.tasks)
app.command("demo")(demo.demo)


def _version(show: bool) -> bool:
    if show:
        typer.echo(f"fastinterp {fastinterp.__version__}")
        raise typer.Exit
    return show


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """A batch engine for mechanistic interpretability: from a prompt file and a model to a zarr store."""


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130/143 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _plainly(warnings.showwarning)
            app()
    except FastinterpError as error:
        print(f"fastinterp: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        print(f"fastinterp: {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.signal_number)
    except OSError as error:
        # Disk full, permissions: what was committed is kept, and running the command again resumes.
        print(f"fastinterp: {error}", file=sys.stderr)
        sys.exit(1)


def _plainly(usual: Any) -> Any:
    """Shows what prompts are warned of as one line, everything else as usual."""

    def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, AnswerSpaceWarning):
            print(f"fastinterp: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **options)

    return show
