"""The command ``lightning-peft``. Imports everything."""

from lightning_peft.cli.command_line import COMMANDS, PEFTCLI, RUNS, main

__all__ = ["COMMANDS", "PEFTCLI", "RUNS", "main"]
