"""The command line: ``fastinterp scan | info | report | tasks | demo``; one file per subcommand."""

from fastinterp.cli.app import main

__all__ = ["main"]
