"""``fastinterp tasks``: prompts of a built-in task."""

from pathlib import Path
from typing import Annotated

import typer

import fastinterp
from fastinterp.cli.output import say
from fastinterp.errors import OptionError
from fastinterp.prompts import TASKS, make_task

LISTED = "; ".join(f"{name}: {task.description}" for name, task in TASKS.items())


def tasks(
    task: Annotated[str, typer.Argument(help=f"Name of the task. {LISTED}")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl file to write.")],
    n: Annotated[int, typer.Option("-n", help="How many prompts.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts.")] = 0,
    model: Annotated[str | None, typer.Option(help="Keep only words that are one token for this model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Write prompts of a built-in task, with answers, wrong answers and corrupt prompts."""
    if task not in TASKS:
        make_task(task, 1)  # raises, naming the tasks
    if out.suffix != ".jsonl":
        raise OptionError(f"--out {str(out)!r}: give a file that ends in .jsonl")
    if out.exists() and not overwrite:
        raise OptionError(f"--out {str(out)!r} is there already: give another name, or --overwrite to replace it")
    loaded = None if model is None else fastinterp.load(model)
    prompts = make_task(task, n, seed=seed, model=loaded)
    prompts.write(out)
    say(f"{out}: {len(prompts)} prompts")
