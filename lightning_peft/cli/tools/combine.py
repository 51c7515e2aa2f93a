"""The command ``lightning-peft combine``: several LoRAs as one."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli.tools.inspect import base_name, model_class, refuse_place
from lightning_peft.cli.tools.merge import mapped
from lightning_peft.errors import PEFTError
from lightning_peft.operations.combine import How
from lightning_peft.operations.combine import combine as combine_adapters
from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.saving import save_adapter
from lightning_peft.tasks.pretrained import load_model


def combine(
    adapters: list[str],
    weights: list[float] | None = None,
    model: str | None = None,
    out: str = "combined",
    method: How = "cat",
    rank: int | None = None,
    density: float | None = None,
) -> None:
    """Make one LoRA of several of one base, such as their weighted sum.

    Args:
        adapters: The adapter directories, written as a list: "[sql, chat]".
        weights: A weight for each of them, written as a list: "[0.7, 0.3]"; equal ones that sum to 1, if not given.
        model: The base model: a directory, a name on the Hugging Face hub, or package:NAME. The one that the first
            adapter names, if not given.
        out: The directory to write. One that this command wrote before is replaced.
        method: How to combine them: cat is exactly the weighted sum; svd, linear, ties, dare_linear and others are
            HF PEFT's.
        rank: The rank of the result, for svd and those that end in it.
        density: The part of the elements that is kept, for the methods that drop some.

    Raises:
        PEFTError: They are no LoRAs of one base, or the directory cannot be written.
    """
    if len(adapters) < 2 or len(weights or adapters) != len(adapters):
        raise PEFTError(
            f"{adapters} and the weights {weights} were given; two adapters or more, and a weight for each."
        )
    for adapter in adapters:
        refuse_place(Path(adapter), Path(out))
    model = model or base_name(Path(adapters[0]))
    kind = model_class(Path(adapters[0]), model)
    base = mapped(model, kind) or load_model(model, kind)
    names = [f"given_{position}" for position in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        load_adapter(base, adapter, name=name)
    shares = weights or [1 / len(names)] * len(names)
    try:
        combine_adapters(base, names, shares, "combined", method=method, rank=rank, density=density)
    except PEFTError as error:
        said = str(error)
        for name, adapter in zip(names, adapters, strict=True):  # the user knows them by their directories
            said = said.replace(repr(name), repr(adapter))
        raise PEFTError(said) from error
    save_adapter(base, out, name="combined")
    print(f"Wrote {out}: {len(names)} adapters by {method}.")
