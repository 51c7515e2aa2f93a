"""New tokens: some rows of the embedding, and of the output head that is tied to it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.inner_models import input_embedding, transformers_models
from lightning_peft.targets.select import select
from lightning_peft.tensors.sharding import whole, write
from lightning_peft.tensors.weights import own_parameter, tensor_options


class Rows(nn.Module):
    """The trained rows ``[n, dim]`` of an embedding, and of every module that has the same weight."""

    def __init__(self, embedding: nn.Embedding, tokens: list[int], name: str) -> None:
        super().__init__()
        self.tokens, self._name = tokens, name
        options = tensor_options(embedding)
        self._start = whole(embedding.weight)[tokens].to(**options)
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(tokens), embedding.embedding_dim, **options))
        self.register_buffer("places", torch.tensor(tokens, device=embedding.weight.device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the rows to those of the weight."""
        if self.trainable_tokens_delta.is_meta:
            return
        if self._start.is_meta:
            raise PEFTError(
                f"NewTokens: the rows of {self._name!r} start as those of its weight, which had no values yet (device "
                "meta) when the adapter was made. Load the model's weights before injecting."
            )
        with torch.no_grad():
            self.get_buffer("places").copy_(torch.tensor(self.tokens))
        write(self.trainable_tokens_delta, self._start.to(self.trainable_tokens_delta.device))


class NewTokensAdapter(Adapter):
    """e = E'[i] and, beside a tied head, h = E' x, where E' is the weight E with some rows replaced."""

    mergeable = True
    follows_ties = True

    def __init__(self, host: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self._embedding = isinstance(host, nn.Embedding)

    def reset_parameters(self) -> None:
        """Set the rows to those of the weight."""
        self.rows.reset_parameters()

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Replace the vectors of these tokens in ``output`` ``[..., dim]``, or their logits in ``[..., tokens]``."""
        x, rows, places = input_of(args, kwargs), self.rows.trainable_tokens_delta, self.rows.get_buffer("places")
        if isinstance(base, nn.Embedding):
            order = places.argsort()
            nearest = order[torch.bucketize(x, places[order]).clamp(max=len(places) - 1)]
            vectors = functional.embedding(nearest, rows).to(base.weight.dtype) * getattr(base, "embed_scale", 1.0)
            return torch.where((places[nearest] == x)[..., None], vectors.to(output.dtype), output)
        # The change of the logits, and not the logits: nothing at the start, and little that can be rounded.
        change = functional.linear(x, (rows - cast(Tensor, base.weight)[places]).to(x.dtype))
        return output.index_add(-1, places, change.to(output.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with the rows written into it; one of an embedding comes as ``[dim, tokens]``."""
        rows, places = self.rows.trainable_tokens_delta.detach().to(weight.dtype), self.rows.get_buffer("places")
        if self._embedding:
            return weight.index_copy(1, places, rows.T), bias
        return weight.index_copy(0, places, rows), bias


@dataclass(frozen=True, kw_only=True)
class NewTokens(PEFTMethod):
    """Trains the embeddings of some tokens, such as those that were added to a vocabulary, and no others.

    Args:
        token_indices: The tokens' numbers; -1 is the last row of the embedding.
        target_modules: The embedding: names, globs or regular expressions. If not given, the model's input embedding.
            Modules that share its weight, such as a tied output head, follow it.
    """

    name: ClassVar[str] = "new_tokens"
    hosts: ClassVar[str] = "embeddings, with the heads tied to them"
    count: ClassVar[str] = "n d"

    token_indices: list[int] = field(default_factory=lambda: [-1])
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        tokens = self.token_indices
        if isinstance(tokens, str) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise PEFTError(f"NewTokens: token_indices={tokens!r} was given; a list of whole numbers was expected.")
        object.__setattr__(self, "token_indices", list(tokens))
        if not tokens or len(set(tokens)) != len(tokens):
            raise PEFTError(
                f"NewTokens: token_indices={self.token_indices!r} was given; at least one token was expected, and each "
                "of them once."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the embedding, and what shares its weight."""
        chosen = self._embeddings(model)
        weights = {id(module.weight) for module in chosen.values()}
        found: dict[str, nn.Module] = {}
        for name, module in model.modules.items():
            if id(own_parameter(module, "weight")) not in weights:
                continue
            if not isinstance(module, nn.Embedding | nn.Linear):
                raise PEFTError(
                    f"NewTokens: {name!r}, a {type(module).__name__}, shares the weight of {next(iter(chosen))!r}; a "
                    "linear layer was expected. Untie it first."
                )
            found[name] = module
        return found

    def _embeddings(self, model: ModelView) -> dict[str, nn.Embedding]:
        if self.target_modules is None:
            inputs = {id(input_embedding(m)) for m in transformers_models(model).values()}
            found = {n: m for n, m in model.modules.items() if id(m) in inputs and isinstance(m, nn.Embedding)}
            if not found:
                raise PEFTError(
                    f"NewTokens: this {model.kind} has no input embedding that is known. Name it in target_modules."
                )
        else:
            selected = select(model, self.target_modules, adaptable=lambda module: isinstance(module, nn.Embedding))
            found = {name: module for name, module in selected.items() if isinstance(module, nn.Embedding)}
        for name, module in found.items():
            self.tokens(name, module)
        return found

    def tokens(self, name: str, embedding: nn.Embedding) -> list[int]:
        """Return the numbers of the tokens in ``embedding``, from 0.

        Raises:
            PEFTError: It has no such row, or rewrites its weight.
        """
        count = embedding.num_embeddings
        if bad := [token for token in self.token_indices if not -count <= token < count]:
            raise PEFTError(
                f"NewTokens: token_indices has {bad[0]}, but {name!r} has {count} rows. Resize the model's embeddings "
                "first: model.resize_token_embeddings(len(tokenizer))."
            )
        if embedding.max_norm is not None:
            raise PEFTError(
                f"NewTokens: {name!r} is an embedding with max_norm={embedding.max_norm}, which rewrites its weight "
                "while it is read. Leave it out."
            )
        found = [token % count for token in self.token_indices]
        if len(set(found)) != len(found):
            raise PEFTError(f"NewTokens: token_indices={self.token_indices!r} names a row of {name!r} twice.")
        return found

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the adapters; those of modules with one weight share its rows."""
        rows: dict[int, Rows] = {}
        for name, module in hosts.items():
            if isinstance(module, nn.Embedding) and id(module.weight) not in rows:
                rows[id(module.weight)] = Rows(module, self.tokens(name, module), name)
        return {name: NewTokensAdapter(module, rows[id(module.weight)]) for name, module in hosts.items()}
