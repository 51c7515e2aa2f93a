"""The parameters of prefix tuning: the prefixes, or an MLP that gives them (Li & Liang, 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_peft.adapters.virtual_tokens.initial_tokens import start
from lightning_peft.adapters.virtual_tokens.virtual_tokens import refuse_pieces
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.seeding import fill


class Prefixes(nn.Module):
    """The prefixes of all layers: ``[tokens, layers · 2 · heads · head_dim]``, of each layer keys, then values."""

    prompt_embeddings: Tensor

    def __init__(
        self,
        tokens: int,
        layers: int,
        width: int,
        options: Mapping[str, Any],
        seed: int,
        name: str,
        values: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._layers, self._width, self._seed, self._name, self._start = layers, width, seed, name, values
        self._hold(torch.empty(tokens, layers * 2 * width, **options))

    def _hold(self, prefixes: Tensor) -> None:
        self.prompt_embeddings = nn.Parameter(prefixes)

    def reset_parameters(self) -> None:
        """Set the prefixes to the keys and values that they start as, or draw them from N(0, 1)."""
        if self._start is not None:
            start("PrefixTuning", self.prompt_embeddings, self._start)
            return
        fill(self.prompt_embeddings, self._seed, self._name, _normal)

    def forward(self, layer: int) -> Tensor:
        """Return the prefix of a layer ``[tokens, 2 · heads · head_dim]``."""
        return self.prompt_embeddings[:, self._columns(layer)]

    def _columns(self, layer: int) -> slice:
        return slice(layer * 2 * self._width, (layer + 1) * 2 * self._width)


class ProjectedPrefixes(Prefixes):
    """P = MLP(P') (section 4.3): P' ``[tokens, width]``, down ``[hidden, width]``, up ``[layers · 2 · width, hidden]``.

    The buffer ``prompt_embeddings`` is P, brought up to date whenever the state is read: it is all that a file needs.
    """

    def __init__(
        self, tokens: int, layers: int, width: int, options: Mapping[str, Any], seed: int, name: str, hidden: int
    ) -> None:
        super().__init__(tokens, layers, width, options, seed, name)
        self.virtual_tokens = nn.Parameter(torch.empty(tokens, width, **options))
        self.down = nn.Parameter(torch.empty(hidden, width, **options))
        self.down_bias = nn.Parameter(torch.empty(hidden, **options))
        self.up = nn.Parameter(torch.empty(layers * 2 * width, hidden, **options))
        self.up_bias = nn.Parameter(torch.empty(layers * 2 * width, **options))
        self.register_state_dict_pre_hook(_fold)

    def _hold(self, prefixes: Tensor) -> None:
        self.register_buffer("prompt_embeddings", prefixes)

    def reset_parameters(self) -> None:
        """Draw P' from N(0, 1), and the MLP as ``nn.Linear`` does."""
        fill(self.virtual_tokens, self._seed, f"{self._name}.virtual_tokens", _normal)
        for key in ("down", "down_bias", "up", "up_bias"):
            draw = partial(_uniform, getattr(self, key.removesuffix("_bias")).shape[1] ** -0.5)
            fill(getattr(self, key), self._seed, f"{self._name}.{key}", draw)

    def forward(self, layer: int) -> Tensor:
        """Return the prefix of a layer ``[tokens, 2 · heads · head_dim]``."""
        hidden = torch.tanh(functional.linear(self.virtual_tokens, self.down, self.down_bias))
        columns = self._columns(layer)
        return functional.linear(hidden, self.up[columns], self.up_bias[columns])

    def fold(self) -> None:
        """Bring ``prompt_embeddings`` up to date.

        Raises:
            PEFTError: The MLP is in shards. Some state is read by one process alone, which could not put it together.
        """
        refuse_pieces("PrefixTuning", self.up)
        if isinstance(self.up, DTensor):
            raise PEFTError(
                "PrefixTuning: the MLP of prefix_projection=True is in shards, and cannot be folded into a prefix. "
                "Leave self.trainer.strategy.inject() out of configure_model, so that it stays whole on every process."
            )
        if not self.prompt_embeddings.is_meta:
            with torch.no_grad():
                self.prompt_embeddings.copy_(torch.cat([self(layer) for layer in range(self._layers)], dim=1))


def _normal(values: Tensor, generator: torch.Generator) -> None:
    values.normal_(generator=generator)


def _uniform(bound: float, values: Tensor, generator: torch.Generator) -> None:
    values.uniform_(-bound, bound, generator=generator)


def _fold(prefixes: ProjectedPrefixes, *args: Any) -> None:
    prefixes.fold()
