"""A model, looked at once: what the steps of an operation are given instead of walking over its modules each anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_peft.core.adapter import CHILD, Slot, clean_name, unwrap
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.memory import overlapping
from lightning_peft.tensors.weights import own_parameter

T = TypeVar("T")


class _Seen(NamedTuple):
    """What a walk saw of one module."""

    children: list[tuple[str, nn.Module]]
    """Without adapters."""
    slot: Slot | None


class ModelView:
    """What a model is made of, as it was when it was looked at: a view is for one operation and not to be kept.

    Names are clean: without what wrappers (``torch.compile``, FSDP, activation checkpointing) put into them. Adapters
    are no modules of the model.

    Args:
        model: Any module; behind ``torch.compile`` the user's is meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._look(unwrap(model), {}, {})

    def _look(self, module: nn.Module, seen: dict[nn.Module, _Seen], remarks: dict[str, None]) -> None:
        self.module = module
        """The module itself."""
        self.modules: dict[str, nn.Module] = {}
        """Every module by name; one that stands in several places has the first of its names."""
        self.aliases: dict[str, str] = {}
        """The further names of such modules, with the first one."""
        self.walked: list[tuple[str, nn.Module]] = []
        """Every module once, wrappers too, with its clean name."""
        self.whole: tuple[str, ...] = ()
        """Names of the modules that the operation is to train whole."""
        self.remarks = remarks
        """What a user should know of what was done, each said once, in order; views of parts share them."""
        self._seen, self._facts = seen, dict[Callable[..., Any], Any]()
        first: dict[nn.Module, str] = {}
        for raw_name, part in _walk(module, seen):
            name = clean_name(raw_name)
            if part in first:
                self.aliases[name] = first[part]
                continue
            first[part] = name
            self.walked.append((name, part))
            # Of a wrapper and what it wraps, which have one clean name, it is the latter that is the user's.
            if name not in self.modules or name != raw_name:
                self.modules[name] = part
        self.aliases = {name: to for name, to in self.aliases.items() if name not in self.modules}

    def remark(self, text: str) -> None:
        """Have the operation that this view is for tell the user ``text``."""
        self.remarks[text] = None

    @property
    def kind(self) -> str:
        """Name of the module's class, for messages."""
        return type(self.module).__name__

    def part(self, name: str) -> ModelView:
        """Return the view of a module in this one, with names from there; it is not looked at again.

        Raises:
            PEFTError: There is no such module.
        """
        if not name:
            return self
        module = self.modules.get(self.aliases.get(name, name))
        if module is None:
            raise PEFTError(f"This {self.kind} has no part {name!r}.")
        view = object.__new__(ModelView)
        view._look(module, self._seen, self.remarks)
        return view

    @cached_property
    def slots(self) -> list[tuple[str, nn.Module, Slot]]:
        """Name, host and slot of every adapted module, in the order of ``named_modules``."""
        return [(name, module, slot) for name, module in self.walked if (slot := self._seen[module].slot) is not None]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are no adapter's, by name."""
        return dict(self._own(lambda module: module._parameters))

    def parameter(self, name: str) -> nn.Parameter | None:
        """Return a parameter by any of its names, of which one that modules share has several, if there is one."""
        owner, _, leaf = name.rpartition(".")
        module = self.modules.get(self.aliases.get(owner, owner))
        return None if module is None else own_parameter(module, leaf)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers that are no adapter's, and what else has a place beside them in a state, by name."""
        return dict(self._own(own_state))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers and parameters that are no adapter's, by name."""
        return {**dict(self._own(lambda module: module._buffers)), **self.parameters}

    @property
    def adapter_tensors(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer of every adapter, by name; one that adapters share has its first."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for host, _, slot in self.slots:
            prefix = f"{host}.{CHILD}" if host else CHILD
            for name, tensor in slot.tensors().items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{clean_name(name)}"] = tensor
        return found

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters among :attr:`adapter_tensors`."""
        return {name: tensor for name, tensor in self.adapter_tensors.items() if isinstance(tensor, nn.Parameter)}

    @property
    def shared(self) -> set[int]:
        """Ids of parameters that belong to more than one module, or have memory in common with other tensors."""
        once: set[int] = set()
        more: set[int] = set()
        for _, module in self.walked:
            own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
            more |= own & once
            once |= own
        return more | overlapping(self.tensors.values())

    def _own(self, of: Callable[[nn.Module], dict[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield the tensors of every module itself by name, each once, as ``named_parameters`` does."""
        seen: set[int] = set()
        for name, module in self.walked:
            for key, tensor in of(module).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{name}.{clean_name(key)}" if name else clean_name(key), tensor


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether the module ``name``, or one that it is in, is among ``modules``."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name in modules


def own_state(module: nn.Module) -> dict[str, Any]:
    """Return the tensors in the state of ``module`` itself that are no parameters, and have a value by now."""
    own: dict[str, Any] = {}
    # Most modules have none.
    if module._buffers:
        passing = module._non_persistent_buffers_set
        own = {n: b for n, b in module._buffers.items() if n not in passing and not isinstance(b, UninitializedBuffer)}
    if type(module).state_dict is not nn.Module.state_dict and not any(True for _ in module.parameters()):
        # A metric keeps its state in plain attributes, and its state dict has copies of them.
        own.update({k: v for k in module.state_dict() if isinstance(v := module.__dict__.get(k), Tensor)})
    return own


def once(find: Callable[[ModelView], T]) -> Callable[[ModelView], T]:
    """Have what ``find`` finds in a model worked out once for each view. What it returns is not to be changed."""

    @wraps(find)
    def found(view: ModelView) -> T:
        if find not in view._facts:
            view._facts[find] = find(view)
        fact: T = view._facts[find]
        return fact

    return found


@once
def seen_parameters(view: ModelView) -> Mapping[str, nn.Parameter]:
    """Return :attr:`ModelView.parameters`, for operations that put no others in their places."""
    return view.parameters


def _walk(root: nn.Module, seen: dict[nn.Module, _Seen]) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``root.named_modules(remove_duplicate=False)`` does but for adapters, and look at each module once."""
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if module not in seen:
            children = [(key, child) for key, child in module._modules.items() if child is not None]
            slot = next((child for _, child in children if isinstance(child, Slot)), None)
            seen[module] = _Seen([c for c in children if c[1] is not slot], slot)
        yield name, module
        lead = f"{name}." if name else ""
        waiting += [(f"{lead}{key}", child) for key, child in reversed(seen[module].children)]
