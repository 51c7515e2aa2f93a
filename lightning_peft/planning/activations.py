"""Memory of a training step beside weights and optimizer state, found by running the step without any data.

The model runs forward and backward on fake tensors, which have shape, dtype and storage but no bytes, while the
storages that come and go are counted. So it is the model's own code that says what autograd keeps: which inputs of
frozen layers are needed, what gradient checkpointing drops, which weights autocast copies. Formulas that count by hand,
such as equation 2 of Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., 2022),
arXiv:2205.05198 (s·b·h·(34 + 5·a·s/h) bytes a layer), hold for one architecture that is trained whole.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft.adapters.virtual_tokens.infix import IGNORED, answers
from lightning_peft.errors import PEFTError


def step_bytes(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    dtype_of: Callable[[str, Tensor], torch.dtype],
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
) -> int:
    """Return the bytes that one training step of a transformers model needs at most beside its parameters.

    They are an estimate: the batch has padding, attention runs in a fused kernel unless the model is configured
    otherwise, the loss is a cross-entropy over all outputs, kernels need no workspace and the allocator loses nothing.

    Args:
        model: A transformers model, on any device; ``requires_grad`` says what is trained. It is not changed.
        batch_size: Sequences (or images) in a batch.
        sequence_length: Tokens in each; not used for images.
        dtype_of: The dtype in which the parameter or buffer of a name is held.
        autocast: The dtype of mixed precision.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.

    Raises:
        PEFTError: The model's code does not run on fake tensors, or takes neither tokens nor images.
    """
    model = copy.deepcopy(model).train()
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            _set_checkpointing(model, gradient_checkpointing)
            _make_fake(model, dtype_of)
            inputs = _inputs(model, batch_size, sequence_length)
            with _LiveBytes(model) as live, torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = _loss(model, inputs)
                loss.backward()
    except PEFTError:
        raise
    except Exception as error:  # of the model's own code, which may ask for values that a fake tensor has not
        reason = str(error).strip().partition("\n")[0]
        raise PEFTError(f"{type(model).__name__} does not run on fake tensors: {reason}") from error
    peak: int = live.peak
    return peak


def _set_checkpointing(model: Any, enabled: bool) -> None:
    model.config.use_cache = False  # transformers would do it, with a message
    if enabled:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    # A function of its own: its tensors are gone when the backward pass starts, as those of a training_step are.
    tokens = inputs.get("input_ids", torch.empty(0, 0))
    with answers(torch.full_like(tokens, IGNORED)):
        output = model(**inputs)
    scores = (output.logits if hasattr(output, "logits") else output[0]).flatten(0, -2)  # [tokens or images, classes]
    return functional.cross_entropy(scores.float(), scores.new_zeros(len(scores), dtype=torch.long))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, for as long as these live."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self._now -= count


def _make_fake(model: nn.Module, dtype_of: Callable[[str, Tensor], torch.dtype]) -> None:
    """Replace every parameter and buffer by a fake one on the CPU, tied ones by the same."""
    made: dict[int, Tensor] = {}

    def fake(name: str, tensor: Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=dtype_of(name, tensor), device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            store.update({key: fake(f"{prefix}.{key}", t) for key, t in store.items() if t is not None})


def _inputs(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    config: Any = model.config
    kind = getattr(model, "main_input_name", None)
    if kind == "input_ids":
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return {**given, "decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else given
    if kind == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return {"pixel_values": torch.zeros(batch_size, config.num_channels, height, width)}
    raise PEFTError(f"{type(model).__name__} takes {kind!r}; activations are known for models of tokens or of images.")
