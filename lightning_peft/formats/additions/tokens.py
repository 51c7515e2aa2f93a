"""Rows of embeddings that are trained beside adapters: HF PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.addition import Addition, Used
from lightning_peft.formats.counterpart import PREFIX, Counterpart, Shapes
from lightning_peft.formats.counterparts.new_tokens import first_of_each
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.structure.inner_models import input_embedding
from lightning_peft.targets.naming import targets_from

_ROWS = "trainable_tokens_delta"
_ENDING = f".token_adapter.{_ROWS}"


class TokenRows(Addition):
    """A list of tokens for each embedding; what shares its weight follows without tensors of its own."""

    method = NewTokens
    key = "trainable_token_indices"
    types = frozenset({"LORA"})
    several = True

    def value(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> dict[str, list[int]]:
        """Return the tokens, counted from the first row, by the name of the embedding."""
        return {
            name: cast(NewTokens, used.method).tokens(name, embedding)
            for used in given
            for name, embedding in first_of_each(root, used.hosts).items()
        }

    def names(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> dict[str, str]:
        """Return the rows of each embedding."""
        hosts = [host for used in given for host in first_of_each(root, used.hosts)]
        return {f"{PREFIX}{host}{_ENDING}": f"{host}.{CHILD}.rows.{_ROWS}" for host in hosts}

    def owns(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether these are rows of an embedding."""
        return name.endswith(_ENDING)

    def read(
        self, root: ModelView, config: Mapping[str, Any], names: Sequence[str], shapes: Shapes, source: str
    ) -> list[PEFTMethod]:
        """Return a method for each list of tokens."""
        said = config.get(self.key) or {}
        tables = said if isinstance(said, dict) else {_input_embedding(root): said}
        hosts = [name.removeprefix(PREFIX).removesuffix(_ENDING) for name in names]
        Counterpart.modules(root, hosts, source)
        by_tokens: dict[tuple[int, ...], list[str]] = {}
        for host, name in zip(hosts, names, strict=True):
            tokens = next((t for key, t in tables.items() if f".{host}".endswith(f".{key}")), None)
            if not isinstance(tokens, list) or len(shapes[name]) != 2 or shapes[name][0] != len(tokens):
                raise PEFTError(
                    f"{source}: the rows of {host!r} have the shape {list(shapes[name])}; one for each of its "
                    f"tokens in {self.key}={said!r} was expected. It is damaged."
                )
            by_tokens.setdefault(tuple(tokens), []).append(host)
        if lost := [key for key in tables if not any(f".{host}".endswith(f".{key}") for host in hosts)]:
            raise PEFTError(
                f"{source}: its configuration trains rows of {lost[0]!r}, which are not there. It is damaged."
            )
        return [
            NewTokens(token_indices=list(tokens), target_modules=targets_from(found, root))
            for tokens, found in by_tokens.items()
        ]


def _input_embedding(root: ModelView) -> str:
    """Return the name of the embedding that HF PEFT means where a list of tokens names none."""
    found = input_embedding(root.module)
    names = [name for name, module in root.modules.items() if module is found]
    return names[0] if names else "embed_tokens"
