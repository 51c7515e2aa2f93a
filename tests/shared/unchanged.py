"""A model as it is, down to identities and hooks, and whether it is so still."""

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "attributes": {name: list(module.__dict__) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "state": {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, old = after.pop("state"), before["state"]
    assert list(state) == list(old)
    for key, (identity, value) in state.items():
        assert identity == old[key][0], key
        assert torch.equal(value, old[key][1]), key
    for what, value in after.items():
        assert value == before[what], what
