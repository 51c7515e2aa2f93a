"""The command ``lightning-peft``.

Imports core, operations, files, formats.serving, storage, planning, parsing, analysis, callbacks, strategy,
strategy.bases, tasks, tasks.pretrained, comparison and cli.tools.
"""

from lightning_peft.cli.command_line import COMMANDS, PEFTCLI, RUNS, main

__all__ = ["COMMANDS", "PEFTCLI", "RUNS", "main"]
