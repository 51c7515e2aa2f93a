"""How adapters hang on a model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, LoRA, PEFTError, inject
from lightning_peft.core.adapter import Adapter, restore_hooks
from lightning_peft.core.view import ModelView


class Attending(nn.Module):
    """Two modules that read their weights themselves, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.linears = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            x = attention(x, x, x)[0]
        return self.linears(x)


METHODS: dict[str, Callable[[], object]] = {
    "replaced weights": lambda: LoRA(r=2, target_modules="attentions.*"),
    "changed inputs": lambda: IA3(target_modules="linears.*", feedforward_modules="linears.*"),
    "added outputs": lambda: LoRA(r=2, target_modules="linears.*"),
}


@pytest.mark.parametrize("kind", METHODS)
def test_every_host_is_hooked_again(kind: str) -> None:
    """Lightning's inference under DeepSpeed takes all hooks off all modules."""
    model, x = Attending(), torch.randn(2, 5, 8)
    inject(model, METHODS[kind]())
    for name, parameter in model.named_parameters():
        if ".peft." in name:
            nn.init.normal_(parameter)
    expected = model(x)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert not torch.allclose(model(x), expected)
    restore_hooks(ModelView(model).slots)
    assert torch.equal(model(x), expected)


def test_what_an_adapter_lacks_is_said() -> None:
    """Of whoever writes a method."""
    adapter = type("Bare", (Adapter,), {})()
    with pytest.raises(PEFTError, match="Bare cannot be merged into weights"):
        adapter.fold(torch.ones(1), None)
    with pytest.raises(TypeError, match="Bare names weights to replace but does not define replace"):
        adapter.replace({})
    with pytest.raises(TypeError, match="Bare does not define reset_parameters"):
        adapter.reset_parameters()
    x = torch.ones(2)
    assert adapter(nn.Identity(), (x,), {}, x) is x
    assert adapter.before(nn.Identity(), (x,), {}) == ((x,), {})
