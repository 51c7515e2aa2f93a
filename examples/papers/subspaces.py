"""Print how the adapters of `grids/weight_types.yaml` lie to one another, and to the weights that they change.

    python examples/papers/subspaces.py runs/papers/weight_types --base runs/papers/base

Of LoRA's section 7: the similarity φ of the directions of A, and of the right ones of ΔW (equation 4), the factor by
which ΔW amplifies its directions in W (table 7), and how far they lie in the first tenth of W's own (appendix H.3):
means over layers.
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import fmean

from transformers import AutoModelForCausalLM

from lightning_peft import load_adapter
from lightning_peft.analysis import Basis, amplification, changes, random_similarity, read_changes, similarity

BASES: dict[Basis, str] = {"A": "of A", "right": "of ΔW"}
WEIGHTS = ("q_proj", "v_proj")
# Two adapters, each by its rank and seed: of one seed they may begin alike.
PAIRS = (((8, 0), (64, 1)), ((8, 1), (64, 0)), ((8, 0), (8, 1)), ((64, 0), (64, 1)))
COLUMNS = ("weight_norm", "change_norm", "in_change", "in_weight", "in_random", "factor", "in_top")
DIRECTIONS = ((1, 1), (1, 8), (4, 4), (8, 8))


def trained(grid: Path, rank: int, seed: int, rate: str) -> Path:
    """Return the directory of the adapter on queries and values of a rank and seed."""
    found = sorted(grid.glob(f"runs/q_v_rank={rank}_lr={rate}_seed={seed}-*/trained"))
    if not found:
        raise SystemExit(
            f"error: {grid} has no adapter of rank {rank}, rate {rate} and seed {seed}. Run the grid first."
        )
    return found[0]


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="the directory of the grid's results")
    parser.add_argument("--base", default="runs/papers/base", help="the base model")
    parser.add_argument("--rate", default="0.01", help="the learning rate that was chosen")
    given = parser.parse_args()
    found = {run: read_changes(trained(given.grid, *run, given.rate)) for pair in PAIRS for run in pair}
    print("| directions | weights | rank, seed | and | " + " | ".join(f"φ({i}, {j})" for i, j in DIRECTIONS) + " |")
    print("|---|---|---|---|" + "---|" * len(DIRECTIONS))
    for basis, weight, (one, other) in product(BASES, WEIGHTS, PAIRS):
        names = [name for name in found[one] if weight in name]
        grids = [similarity(found[one][name], found[other][name], basis) for name in names]
        means = [f"{fmean(float(grid[i - 1, j - 1]) for grid in grids):.2f}" for i, j in DIRECTIONS]
        print(f"| {BASES[basis]} | {weight} | {one[0]}, {one[1]} | {other[0]}, {other[1]} | {' | '.join(means)} |")
    width = next(iter(found[8, 0].values())).right.shape[1]
    means = [f"{random_similarity(i, j, width):.2f}" for i, j in DIRECTIONS]
    print("| random | | | | " + " | ".join(means) + " |\n")
    headings = (
        "norm of W",
        "of ΔW",
        "of W in ΔW's directions",
        "in its own",
        "in random ones",
        "factor",
        "in top 10 %",
    )
    print(f"| weights | rank | {' | '.join(headings)} |\n|---|---|{'---|' * len(headings)}")
    for rank in (4, 8, 64):
        model = AutoModelForCausalLM.from_pretrained(given.base)
        load_adapter(model, trained(given.grid, rank, 0, given.rate))
        tables = [(name, amplification(change)) for name, change in changes(model)]
        for weight in WEIGHTS:
            of = [table for name, table in tables if weight in name]
            means = [f"{fmean(getattr(table, column) for table in of):.2f}" for column in COLUMNS]
            print(f"| {weight} | {rank} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
