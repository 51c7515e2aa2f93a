"""Which tokens of a text follow the sequence that activates a LoRA.

Activated LoRA: Fine-tuned LLMs for Intrinsics (Greenewald et al., 2025), arXiv:2504.12397, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.virtual_tokens.of_call import OfCall
from lightning_peft.adapters.virtual_tokens.virtual_tokens import by_name
from lightning_peft.core.adapter import Adapter
from lightning_peft.errors import PEFTError

_KEPT = "lightning_peft_invocations"
"""Attribute of a cache: what was found in the text that it holds, by the sequence. Copies of the cache have it too."""

_NOWHERE = 1 << 62
"""Where the sequence starts in a text without it."""


class Invocation(Adapter):
    """On the decoder: finds where each row was last told to activate the adapters; they are active from there on.

    A call that goes on from a filled cache goes on from what was found in the text that the cache holds: a single token
    is taken for a generated one, which activates nothing, and several are searched. What a cache was filled with while
    this did not run is taken for text without the sequence.

    Args:
        tokens: The sequence, as ids of tokens.
    """

    by_row = False

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self._tokens = tokens
        self._of_call = OfCall("LoRA with alora_invocation_tokens", "which tokens activate it")

    def reset_parameters(self) -> None:
        """Do nothing: there are no values."""

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the sequence in what the decoder is called with.

        Raises:
            PEFTError: There are no ids of tokens, or rows are not those of the cache.
        """
        named, cache = by_name(base, args, kwargs)
        if not isinstance(ids := named.get("input_ids"), Tensor):
            raise PEFTError(
                "LoRA: alora_invocation_tokens are looked for in a text's ids, but the model was called without "
                "input_ids. Call it with them, not with inputs_embeds, and without methods that put virtual tokens in."
            )
        _refuse_packed(named)
        held = 0 if cache is None else int(cache.get_seq_length())
        starts, ending = self._found(ids, cache, held)
        columns = torch.arange(held, held + ids.shape[1], device=ids.device)
        self._of_call.value = columns >= starts[:, None], (starts, ending, held + ids.shape[1])
        return args, kwargs

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Have the cache keep what was found, for calls that go on from it."""
        cache = by_name(base, args, kwargs)[1]
        if cache is None:
            values = output if isinstance(output, tuple) else output.values()
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
        call = self._of_call.value
        if cache is not None:
            setattr(cache, _KEPT, {**getattr(cache, _KEPT, {}), self._tokens: call[1]})
        self._of_call.follow(output[0])
        return output

    def active(self, x: Tensor) -> Tensor:
        """Return for which tokens a layer within the call is active, bool, as ``x`` but for its last dimension, 1.

        Args:
            x: What the layer is given: ``[batch, tokens, features]``, or the same in rows, or the last tokens alone, as
                a language model's head may be.

        Raises:
            PEFTError: The tokens of ``x`` are not known.
        """
        call = self._of_call.value
        if call is None:
            raise PEFTError(
                "LoRA: a layer with alora_invocation_tokens ran outside of a call of its model, so that the text is "
                "not known. Call the model."
            )
        active: Tensor = call[0].to(x.device)
        rows, tokens = active.shape
        if x.dim() == 3 and len(x) == rows and x.shape[1] <= tokens:
            return active[:, tokens - x.shape[1] :, None]
        if x.dim() == 2 and len(x) == rows * tokens:
            return active.reshape(-1, 1)
        raise PEFTError(
            f"LoRA: a layer with alora_invocation_tokens was given {list(x.shape)} in a call with {rows} rows of "
            f"{tokens} tokens, so that it is not known which of these it has. Leave it out with exclude_modules."
        )

    def _found(self, ids: Tensor, cache: Any, held: int) -> tuple[Tensor, Tensor]:
        """Return where the sequence starts in each row, in columns of cache and text, and the text's last tokens."""
        nothing = torch.full((len(ids),), _NOWHERE, device=ids.device), ids[:, :0], held
        starts, ending, length = getattr(cache, _KEPT, {}).get(self._tokens, nothing) if held else nothing
        if len(starts) != len(ids):
            raise PEFTError(
                f"LoRA: {len(ids)} rows go on from a cache of {len(starts)}, so that it is not known in which of them "
                "alora_invocation_tokens were. Call the model with as many rows as filled the cache."
            )
        # A cache may have been cut since.
        starts = torch.where(starts < held, starts, _NOWHERE)
        if held and ids.shape[1] == 1:
            return starts, ids[:, :0]
        # The sequence may have begun in the call before.
        text = torch.cat([ending, ids], dim=1) if length == held else ids
        begins = held + ids.shape[1] - text.shape[1]
        size = text.shape[1] - len(self._tokens) + 1
        if size > 0:
            matches = torch.ones(len(text), size, dtype=torch.bool, device=ids.device)
            for offset, token in enumerate(self._tokens):
                matches = matches & (text[:, offset : offset + size] == token)
            last = torch.where(matches, torch.arange(size, device=ids.device), -1).amax(dim=1)
            starts = torch.where(last >= 0, begins + last, starts)
        return starts, text[:, max(text.shape[1] - len(self._tokens) + 1, 0) :]


def _refuse_packed(named: Mapping[str, Any]) -> None:
    """Check that a row is one text: of several it is not known which of them the sequence activates.

    Raises:
        PEFTError: Positions begin anew within a row.
    """
    positions, mask = named.get("position_ids"), named.get("attention_mask")
    if torch.compiler.is_compiling() or not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    anew = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.dim() == 2:  # of padding, positions say nothing
        kept = mask[:, -positions.shape[1] :].bool()
        anew = anew & kept[:, 1:] & kept[:, :-1]
    if bool(anew.any()):
        raise PEFTError(
            "LoRA: alora_invocation_tokens activate the rest of a row, but this row holds several texts: its "
            "position_ids begin anew. Train without packing (packing=False)."
        )
