"""The examples' configs, and what the command's parser makes of one."""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.cli import PEFTCLI

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"


class Read(PEFTCLI):
    """The command line up to what its parser makes of it."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self.subcommand, self.trainer, self.model = "", None, None

    def instantiate_classes(self) -> None:
        return

    def _run_subcommand(self, subcommand: str) -> None:
        return
