"""The command ``lightning-peft``.

Imports core, operations, formats.serving, planning, parsing, callbacks, strategy, strategy.bases, tasks,
tasks.pretrained and cli.tools.
"""

from lightning_peft.cli.command_line import COMMANDS, PEFTCLI, RUNS, main

__all__ = ["COMMANDS", "PEFTCLI", "RUNS", "main"]
