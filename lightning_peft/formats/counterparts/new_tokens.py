"""New tokens in HF PEFT's format: the rows of each embedding, which it writes again for what shares the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import PREFIX, Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.targets.naming import targets_from

_ROWS = "trainable_tokens_delta"


class NewTokensInHF(Counterpart):
    """``TRAINABLE_TOKENS``."""

    method = NewTokens
    peft_type = "TRAINABLE_TOKENS"
    keys = frozenset({"token_indices"})
    parameters: ClassVar[Mapping[str, str]] = {_ROWS: f"rows.{_ROWS}"}

    def config(self, root: ModelView, method: NewTokens, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the tokens, counted from the first row, and the embeddings."""
        first = first_of_each(root, hosts)
        tokens, *others = [method.tokens(name, embedding) for name, embedding in first.items()]
        if any(other != tokens for other in others):
            raise PEFTError(
                f"NewTokens: token_indices={method.token_indices!r} are other rows in each of {', '.join(first)}, and "
                "a file has one list for all. Count the tokens from 0."
            )
        return {"token_indices": tokens, "target_modules": targets_for_hf(first, root)}

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the method."""
        tokens = config.get("token_indices")
        hosts = self.hosts(root, shapes, source)
        for host in hosts:
            shape = shapes[f"{PREFIX}{host}.{_ROWS}"]
            if not isinstance(tokens, list) or len(shape) != 2 or shape[0] != len(tokens):
                raise PEFTError(
                    f"{source}: the rows of {host!r} have the shape {list(shape)}; one for each of the configuration's "
                    f"token_indices={tokens!r} was expected. It is damaged."
                )
        return NewTokens(
            token_indices=list(tokens or ()), target_modules=targets_from(first_of_each(root, hosts), root)
        )

    def names(self, root: ModelView, method: NewTokens, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the names of the rows, which are those of the first module that has them."""
        return {f"{PREFIX}{host}.{_ROWS}": f"{host}.{CHILD}.rows.{_ROWS}" for host in first_of_each(root, hosts)}

    def repeats(self, root: ModelView, method: NewTokens, hosts: Iterable[str]) -> dict[str, str]:
        """Return the rows of what shares a weight, a tied head's."""
        hosts, modules = list(hosts), root.modules
        first = {id(module.weight): name for name, module in first_of_each(root, hosts).items()}
        return {f"{PREFIX}{host}.{_ROWS}": f"{first[id(modules[host].weight)]}.{CHILD}.rows.{_ROWS}" for host in hosts}


def first_of_each(root: ModelView, hosts: Iterable[str]) -> dict[str, Any]:
    """Return the first module of each weight."""
    chosen = set(hosts)
    first: dict[int, tuple[str, nn.Module]] = {}
    for name, module in root.modules.items():
        if name in chosen:
            first.setdefault(id(module.weight), (name, module))
    return dict(first.values())
