"""The command ``lightning-peft``: LightningCLI with this package's strategies, and commands of its own."""

from __future__ import annotations

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

# Imported for its classes, which then go by their short names in a config, and for the strategies' registration.
import lightning_peft.callbacks
import lightning_peft.tasks  # noqa: F401
from lightning_peft.callbacks import PredictionWriter
from lightning_peft.cli.compare import compare
from lightning_peft.cli.messages import in_words, named_strategy
from lightning_peft.cli.plan import show_plan
from lightning_peft.cli.tools.analyse import analyse
from lightning_peft.cli.tools.chat import chat
from lightning_peft.cli.tools.checks import diff, verify
from lightning_peft.cli.tools.combine import combine
from lightning_peft.cli.tools.configs import configs
from lightning_peft.cli.tools.convert import convert
from lightning_peft.cli.tools.export import export
from lightning_peft.cli.tools.inspect import inspect
from lightning_peft.cli.tools.merge import merge
from lightning_peft.cli.tools.push import push
from lightning_peft.errors import PEFTError
from lightning_peft.formats.serving.readers import READERS
from lightning_peft.parsing.constructor_errors import escaping, make, unescaped
from lightning_peft.parsing.method_errors import class_error, method_error
from lightning_peft.strategy import PEFTStrategy

PROG = "lightning-peft"
DESCRIPTION = "Parameter-efficient fine-tuning for any LightningModule, as one Trainer flag."
COMMANDS: dict[str, Callable[..., None]] = {
    "configs": configs,
    "chat": chat,
    "inspect": inspect,
    "analyse": analyse,
    "merge": merge,
    "export": export,
    "convert": convert,
    "combine": combine,
    "verify": verify,
    "diff": diff,
    "push": push,
}
"""Commands that need no Trainer."""
_WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "reader": ("--for", {"dest": "reader", "type": str, "help": f"Who is to read it: {', '.join(READERS)}."}),
    "private": ("--private", {"action": "store_true", "help": "Make a repository that others do not see."}),
    "json": ("--json", {"action": "store_true", "help": "Print JSON, for programs."}),
    "other": ("other", {"nargs": "?", "help": "Another adapter directory, to compare with."}),
    "words": ("words", {"nargs": "*", "help": "Nothing, or `copy NAME`.", "metavar": "copy NAME"}),
}
"""Arguments whose options are written in a way of their own."""
RUNS = {
    "fit": "Train: inject adapters, train them alone, save them alone, merge them at the end.",
    "validate": "Run one epoch over the validation data.",
    "test": "Run one epoch over the test data.",
    "predict": "Compute predictions and write them, one JSON object for each example.",
}


EPILOG = f"""examples:
  {PROG} fit --config run.yaml --trainer.strategy=peft_lora
  {PROG} fit --config run.yaml --trainer.strategy=PEFTStrategy --trainer.strategy.method=LoRA \\
                     --trainer.strategy.method.r=16
  {PROG} fit --config run.yaml --print_config            everything that can be set, and its value
  {PROG} fit --trainer.strategy.help=PEFTStrategy        the strategy's own options
"""


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, but the lines of descriptions and examples stay as they are written."""


class Parser(LightningArgumentParser):
    """Lightning's, with help for one more mistake, and without hiding the exceptions of constructors."""

    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Add a function that makes objects; what it raises reaches the user as it is."""
        super().add_instantiator(escaping(instantiator), *args, **kwargs)

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """Make the objects of a config, also those that Lightning has no function for."""
        self.add_instantiator(make, object, subclasses=True)
        # Not Lightning's, which ends with the line that it shows in the commands of others.
        return unescaped(super(LightningArgumentParser, self).instantiate_classes, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit."""
        if method_error(message) is None and (said := class_error(message)) is not None:
            self.exit(2, f"error: {said}\n")
        super().error(in_words(message), ex)


class SaveConfig(SaveConfigCallback):
    """Writes the run's whole config into the logger's directory.

    A second run in the same directory replaces the record of the first instead of failing. A file that was given
    as ``--config`` is never replaced, and a run without a logger, which has no directory of its own, writes none.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, once."""
        if not trainer.loggers:
            return
        given = {Path(path.absolute).resolve() for path in self.config.get("config") or []}
        if Path(trainer.log_dir or ".", self.config_filename).resolve() not in given:
            super().setup(trainer, pl_module, stage)


class PEFTCLI(LightningCLI):
    """LightningCLI whose model and data are given by class, with commands that need no Trainer beside its own."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": PROG,
                # The one that argparse would write names every command in a line too long for a screen.
                "usage": f"{PROG} [--config FILE] COMMAND ...",
                "version": version("lightning_peft"),
                "description": DESCRIPTION,
                "epilog": EPILOG,
                "formatter_class": HelpFormatter,
            },
            args=args,
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Lightning cuts its help from the first lines of docstrings, in the middle of a sentence.
        self._subcommand_parsers = {}
        commands = parser.add_subcommands(prog=PROG, title="commands", description=f"Details: {PROG} COMMAND --help")
        for name, description in RUNS.items():
            # The usage that argparse would write fills a screen, also above every error message.
            usage = f"{PROG} {name} [--config FILE] [--trainer.KEY VALUE] --model CLASS [--data CLASS]"
            self._subcommand_parsers[name] = self._prepare_subcommand_parser(
                Trainer, name, description=description, usage=usage
            )
            if name == "predict":
                self._subcommand_parsers[name].add_argument(
                    "--output", type=str, default="predictions.jsonl", help="The file of JSON lines to write."
                )
            commands.add_subcommand(name, self._subcommand_parsers[name], help=description)
        summary = parse(show_plan.__doc__ or "").short_description
        usage = f"{PROG} plan [--config FILE] [--devices N] [--num_nodes N] [--gpu_memory GIB] --model CLASS"
        planner = self._prepare_subcommand_parser(Trainer, "fit", description=summary, usage=usage)
        self._plan_options = planner.add_function_arguments(show_plan, as_group=False, skip={"run", "json"})
        option, how = _WRITTEN["json"]
        planner.add_argument(option, **how)
        commands.add_subcommand("plan", planner, help=summary)
        for name, function in {"compare": compare, **COMMANDS}.items():
            summary = parse(function.__doc__ or "").short_description
            command = ArgumentParser(description=summary)
            skip = {"parse", *_WRITTEN}
            command.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)  # type: ignore[arg-type]
            for argument, (option, how) in _WRITTEN.items():
                if argument in signature(function).parameters:
                    command.add_argument(option, **how)
            commands.add_subcommand(name, command, help=summary)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line; run a command that needs no Trainer and end there.

        Raises:
            PEFTError: There is no strategy of the given name.
        """
        # Not super(): it warns when called with arguments from within another program.
        assert args is None or isinstance(args, list)
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        if command in COMMANDS:
            COMMANDS[command](**self.config[command].as_dict())
            raise SystemExit(0)
        if command == "compare":
            compare(parser.parse_args, **self.config[command].as_dict())
            raise SystemExit(0)
        strategy = self.config[command].trainer.strategy
        if isinstance(strategy, str):
            self.config[command].trainer.strategy = named_strategy(strategy)
        if command == "plan":
            run = self.config[command].as_dict()
            fits = show_plan(run, **{option: run[option] for option in (*self._plan_options, "json")})
            raise SystemExit(0 if fits else f"{PROG}: nothing fits {run['gpu_memory']} GiB")

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: Lightning would have a checkpoint's hyper-parameters, class paths included, in it.

        A file does not decide what is executed, and what the command line says holds.
        """

    def _tell_of_new_adapters(self) -> None:
        """Warn if nothing says which adapters are meant: new ones, which change nothing, would be used in silence."""
        begun = self._get(self.config, "trainer").strategy
        named = isinstance(begun, Namespace) and begun.init_args.get("init_adapter") is not None
        if self._get(self.config, "ckpt_path") is None and not named:
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path: the adapters are new and change nothing, so that this is the "
                "base model, unless the model loads adapters itself. Give --ckpt_path=checkpoints/last, or "
                "--trainer.strategy.init_adapter=DIRECTORY."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; one that predicts writes what it predicts."""
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand != "fit" and isinstance(trainer.strategy, PEFTStrategy):
            self._tell_of_new_adapters()
        if self.subcommand == "predict":
            trainer.callbacks.append(PredictionWriter(self._get(self.config, "output")))  # type: ignore[attr-defined]
        return trainer


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-peft`` with ``args``, or with the command line's.

    What a user can mend is printed as one message, with exit status 1. Other exceptions are faults of a program,
    perhaps of the user's own model, and keep their traceback.
    """
    if args is None:
        # As with `python -m`, a config can name classes in the working directory; installed modules come first.
        sys.path.append(os.getcwd())
    try:
        PEFTCLI(args)
    except (PEFTError, MisconfigurationException, OSError) as error:
        sys.exit(f"{PROG}: error: {error}")
