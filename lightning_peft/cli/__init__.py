"""The command ``lightning-peft``.

Imports core, operations, files, formats, formats.serving, storage, planning, callbacks, strategy, strategy.bases,
tasks, tasks.batches and tasks.pretrained.
"""

from lightning_peft.cli.command_line import COMMANDS, PEFTCLI, RUNS, main

__all__ = ["COMMANDS", "PEFTCLI", "RUNS", "main"]
