"""Which modules compute the plain function of their weight, and that finding out leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from odd_layers import LAYERS, Einsum, Own, given, made
from torch import Tensor, nn

from lightning_peft.structure.plain import is_own_linear, nature, obstacle


@pytest.mark.parametrize("name", LAYERS)
def test_nature(name: str) -> None:
    assert nature(made(name)) == LAYERS[name][0]


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name][0] == "plain"])
def test_plain_layers_do_with_another_weight_what_a_plain_one_does(name: str) -> None:
    """The definition, by a change of the weight itself: of an additive function, the change is added."""
    layer, x = made(name).eval(), given(name)
    base, change = layer(x), torch.randn(layer.weight.shape)
    scale = getattr(layer, "embed_scale", 1.0)
    with torch.no_grad():
        layer.weight += change
        changed = layer(x)
        layer.weight.copy_(change)
        bias = layer._parameters.get("bias")
        offset = 0 if bias is None else bias.reshape(-1, *[1] * (x.dim() - 2)) if x.dim() > 2 else bias
        assert torch.allclose(changed - base, layer(x) - offset, atol=1e-4 * scale)


def state(module: nn.Module) -> dict[str, Any]:
    return {
        "rng": torch.get_rng_state(),
        "attributes": [{key: id(value) for key, value in part.__dict__.items()} for part in module.modules()],
        "values": [
            copy.copy(v) for part in module.modules() for v in part.__dict__.values() if isinstance(v, dict | int)
        ],
        "tensors": [tensor.clone() for tensor in (*module.parameters(), *module.buffers())],
    }


@pytest.mark.parametrize("name", LAYERS)
def test_no_trace_is_left(name: str) -> None:
    module = made(name)
    module.register_forward_hook(lambda *_: pytest.fail("a hook of others ran"))
    before = state(module)
    nature(module)
    after = state(module)
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    assert all(torch.equal(a, b) for a, b in zip(before.pop("tensors"), after.pop("tensors"), strict=True))
    assert before == after


def test_what_cannot_be_run_is_judged_by_its_class() -> None:
    class Derived(nn.Linear):
        pass

    assert nature(nn.Linear(4, 4, device="meta")) == nature(Derived(4, 4, device="meta")) == "plain"
    assert nature(Einsum(4, 4, device="meta")) == "beside"


def test_a_layer_that_takes_more_arguments_is_not_known() -> None:
    class Gated(nn.Linear):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return gate * super().forward(x)

    assert nature(Gated(4, 4)) == "beside"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("channels first", "what a ChannelsFirst makes of its input is not of the shape"),
        ("positions", "is not a lookup of it"),
        ("activated", None),
    ],
)
def test_obstacles(name: str, reason: str | None) -> None:
    found = obstacle(made(name))
    assert found is None if reason is None else reason in str(found)


def test_other_modules_have_no_obstacle() -> None:
    assert obstacle(nn.LayerNorm(4)) is None


class Router(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=-1)


class Table(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


def test_linear_layers_of_others() -> None:
    assert is_own_linear(Own())
    assert is_own_linear(Own(bias=False))
    for other in (Router(), Table(), nn.Linear(4, 6), nn.LayerNorm(4), nn.Embedding(4, 6), nn.Bilinear(4, 4, 6)):
        assert not is_own_linear(other)
