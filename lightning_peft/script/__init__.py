"""What the installed command ``lightning-peft`` runs first: its help and its version, without importing PyTorch.

Imports cli.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from difflib import get_close_matches
from importlib.metadata import version

PROG = "lightning-peft"
COMMANDS = {
    "fit": "Train: inject adapters, train them alone, save them alone, merge them at the end.",
    "validate": "Run one epoch over the validation data.",
    "test": "Run one epoch over the test data.",
    "predict": "Compute predictions and write them, one JSON object for each example.",
    "plan": "Print the memory that a run needs on each device, and that of other base strategies. No weight is loaded.",
    "compare": "Train every cell of a grid, choose the learning rate of each on validation data, and compare them over "
    "seeds.",
    "configs": "List the configs that come with the package, or copy one to edit: `configs copy NAME`.",
    "chat": "Talk to a causal language model with an adapter, in the terminal.",
    "inspect": "Show what an adapter directory or a checkpoint holds.",
    "analyse": "Show what an adapter has done to each weight: how large its change is, of which rank, and in which "
    "directions.",
    "merge": "Merge an adapter into its base model and write the result as an ordinary Transformers model.",
    "export": "Copy an adapter for another program, so that it reads what was trained.",
    "convert": "Turn an adapter of another method, or a fine-tuned model, into the LoRA that is nearest to it.",
    "combine": "Make one LoRA of several of one base, such as their weighted sum.",
    "verify": "Check that an adapter is whole and belongs to a base model.",
    "diff": "Show how two adapters differ: in hyper-parameters, in modules, and in what they make of each weight.",
    "push": "Send an adapter to a model hub: its files and a model card, and nothing of the run that trained it.",
}
"""The commands in the order of the help, each with what it does."""

DESCRIPTION = "Parameter-efficient fine-tuning for any LightningModule, as one Trainer flag."
EPILOG = f"""examples:
  {PROG} fit --config run.yaml --trainer.strategy=peft_lora
  {PROG} fit --config run.yaml --trainer.strategy=PEFTStrategy --trainer.strategy.method=LoRA \\
                     --trainer.strategy.method.r=16
  {PROG} fit --config run.yaml --print_config            everything that can be set, and its value
  {PROG} fit --trainer.strategy.help=PEFTStrategy        the strategy's own options
"""
USAGE = f"{PROG} [--config FILE] COMMAND ..."


def parser() -> ArgumentParser:
    """Return a parser that knows the help of the command as a whole, and nothing of each command's own arguments."""
    made = ArgumentParser(
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    made.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    # jsonargparse's own option, and LightningCLI's two, in the words in which they print them.
    made.add_argument("--version", action="version", version="", help="Print version and exit.")
    made.add_argument("-c", "--config", help="Path to a configuration file in json or yaml format.")
    made.add_argument(
        "--print_config",
        metavar="\b[=flags]",
        help="Print the configuration after applying all other arguments and exit. The optional flags customizes the "
        "output and are one or more keywords separated by comma. The supported flags are: skip_default, skip_unset.",
    )
    commands = made.add_subparsers(
        title="commands",
        description=f"Details: {PROG} COMMAND --help",
        metavar="Available subcommands:",
        help="(required)",
    )
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return made


def main() -> None:
    """Run ``lightning-peft`` with the command line's arguments.

    Help of the whole command, the version, and that there is no such command are printed at once; all else is
    :func:`lightning_peft.cli.main`'s, with whose parser this one is compared in ``tests/cli/test_script.py``. This
    module is installed beside the package, as ``lightning_peft_script``: for one within it Python runs the package's
    ``__init__`` first, which imports Lightning and takes seconds.
    """
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        parser().print_help()
    elif arguments == ["--version"]:
        print(PROG, version("lightning_peft"))
    elif arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        print(_no_command(arguments[0]), file=sys.stderr)
        sys.exit(2)
    else:
        from lightning_peft.cli import main as run

        run()


def _no_command(given: str) -> str:
    near = get_close_matches(given, COMMANDS, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"{PROG}: error: There is no command {given!r}.{guess} The commands are {', '.join(COMMANDS)}."
