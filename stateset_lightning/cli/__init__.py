"""The command line: one file per command, `main` chooses."""

from stateset_lightning.cli.main import main

__all__ = ["main"]
