"""``lightning-peft compare``: a grid of runs side by side, and the table of their results."""

from __future__ import annotations

import io
import json as json_module
import pkgutil
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Trainer

from lightning_peft.analysis.plots import require_matplotlib
from lightning_peft.comparison.cells import Cell, cells, placed, run_of
from lightning_peft.comparison.choosing import seeds_of
from lightning_peft.comparison.grid import Grid, read_grid
from lightning_peft.comparison.machine import Machine, interruptible, require_submitit
from lightning_peft.comparison.plots import plots
from lightning_peft.comparison.results import locked
from lightning_peft.comparison.running import Comparison
from lightning_peft.comparison.table import as_json, markdown, rows, run_lines
from lightning_peft.errors import PEFTError, near
from lightning_peft.files.writing import atomic_file
from lightning_peft.parsing.method_errors import class_error

TABLE, LINES = "table.md", "runs.jsonl"
Parse = Callable[[list[str]], Any]


def compare(
    parse: Parse,
    grid: str,
    out: str | None = None,
    jobs: int | None = None,
    per_job: int = 1,
    cluster: Literal["local", "slurm"] = "local",
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Train every cell of a grid, choose the learning rate of each on validation data, and compare them over seeds.

    Runs resume: given again, the command does what is missing. The table is printed and written to OUT/table.md, every
    run to OUT/runs.jsonl. The status is not 0 if a run failed; the others are done all the same.

    Args:
        parse: Parses the arguments of the command, as a run's config is parsed.
        grid: The YAML file: a config, axes, what is chosen and reported, and where results go.
        out: The directory of the results, instead of the one in the file.
        jobs: Runs at a time: by default one a CUDA device, or one; on a cluster all of them.
        per_job: Runs that one job does one after another, which spares the time to start, and to wait in a queue.
        cluster: Where runs run: on this machine, or as jobs of SLURM, with the parameters of the grid's entry slurm.
        plot: A directory for plots (PNG): each metric along every axis, and against trained parameters.
        json: Print a JSON object in a line for each cell, for programs.

    Raises:
        PEFTError: The grid is not as it should be, which is said before anything runs, or a metric is named that runs
            do not log.
    """
    require_submitit()
    if plot is not None:
        require_matplotlib()
    given = read_grid(grid, out)
    found = cells(given)
    check(parse, given, found)
    machine = Machine(cluster, jobs, per_job, given.out.absolute(), given.slurm)
    with locked(given.out, wait=False):
        comparison = Comparison(given, found, machine, tell=lambda line: print(line, flush=True) if not json else None)
        try:
            with interruptible():
                comparison.run()
        except KeyboardInterrupt:
            raise SystemExit("lightning-peft: stopped. The same command does what is missing.") from None
        made = rows(given, found, comparison.state)
        with atomic_file(given.out / TABLE) as file:
            file.write(markdown(given, made).encode())
        with atomic_file(given.out / LINES) as file:
            for line in run_lines(given, found, comparison.state):
                file.write(json_module.dumps(line).encode() + b"\n")
    if json:
        print("\n".join(json_module.dumps(row) for row in as_json(given, made)))
    else:
        print(f"\n{markdown(given, made)}\n{given.out / TABLE} and {given.out / LINES} written")
    if plot is not None:
        _draw(Path(plot), given, made, quiet=json)
    if failed := sum(row.has_failed for row in made):
        raise SystemExit(f"lightning-peft: error: {failed} of {len(made)} cells have failed; the table says why.")


def check(parse: Parse, grid: Grid, found: list[Cell]) -> None:
    """Parse the config of every cell as its run will, and make its methods.

    Raises:
        PEFTError: A config refuses something.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        for cell in found:
            for candidate in cell.candidates or [None]:
                run = run_of(grid, cell, candidate, seeds_of(grid)[0])
                file.write_text(yaml.safe_dump(placed(run), sort_keys=False), encoding="utf-8")
                if (said := _refusal(parse, file)) is not None:
                    raise PEFTError(f"{grid.source}, cell {run.name!r}: {said}")


def _refusal(parse: Parse, file: Path) -> str | None:
    """Return what is wrong with the config of a run, if something is."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            config = parse(["fit", f"--config={file}"])
        methods = config.fit.trainer.strategy.init_args.method
        for method in methods if isinstance(methods, list) else [methods]:
            if not isinstance(method, str):
                arguments = method.get("init_args")
                pkgutil.resolve_name(method.class_path)(**(arguments.as_dict() if arguments else {}))
    except SystemExit:
        return _in_words(said := printed.getvalue().rpartition("error: ")[2].strip()) or said
    except ValueError as error:
        return str(error)
    return None


def _in_words(message: str) -> str | None:
    """Return what is wrong with a key of a config, or its value, if jsonargparse's ``message`` is about one."""
    if option := re.search(r"does not accept option 'trainer\.(\w+)'", message):
        return f"The Trainer has no {option[1]!r}. {near(option[1], signature(Trainer).parameters)}".strip()
    return class_error(message)


def _draw(folder: Path, grid: Grid, made: list[Any], quiet: bool) -> None:
    for name, figure in plots(grid, made):
        path = folder / f"{name}.png"
        image = io.BytesIO()
        figure.savefig(image, format="png")
        with atomic_file(path) as file:
            file.write(image.getvalue())
        if not quiet:
            print(f"{path} written")
