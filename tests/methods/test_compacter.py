"""Compacter against the paper's equations in float64, and its counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from families import build, outputs, randomise
from torch import Tensor, nn

from lightning_peft import Compacter, PEFTError, adapter_state_dict, inject, load_adapter, save_adapter
from lightning_peft.core.view import ModelView


def phm(slow: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """W of equation 5: the sum of A_i ⊗ (s_i t_iᵀ)."""
    terms = [torch.kron(a, torch.einsum("p,q->pq", s_i, t_i)) for a, s_i, t_i in zip(slow, s, t, strict=True)]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize(("n", "bias", "placement"), [(4, True, ["attention", "mlp"]), (2, False, ["mlp"])])
def test_it_computes_the_paper_s_equation(n: int, bias: bool, placement: Any) -> None:
    model = build("llama")[0].double()
    method = Compacter(bottleneck=8, n=n, bias=bias, placement=placement, scale=1.5, train_norms=False)
    hosts = inject(model, method)
    assert hosts == [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name, kind in (("self_attn.o_proj", "attention"), ("mlp.down_proj", "mlp"))
        if kind in placement
    ]
    with torch.no_grad():
        for parameter in ModelView(model).adapter_parameters.values():
            parameter.normal_(std=0.5)
    slow = next(p for name, p in ModelView(model).adapter_parameters.items() if name.endswith("phm_A"))
    for host in hosts:
        linear = model.get_submodule(host)
        own = dict(linear.peft.default.named_parameters())
        x = torch.randn(3, 2, linear.in_features, dtype=torch.float64)
        h = x @ linear.weight.T
        down, up = phm(slow, own["down_s"], own["down_t"]), phm(slow, own["up_s"], own["up_t"])
        assert down.shape == (8, 32)
        hidden = h @ down.T + own.get("down_bias", torch.zeros(8))
        expected = h + 1.5 * (nn.functional.gelu(hidden) @ up.T + own.get("up_bias", torch.zeros(32)))
        assert (expected - h).abs().max() > 1e-4
        assert (linear(x) - expected).abs().max() <= 1e-12


def test_slow_weights_are_one_tensor_and_get_the_gradient_of_all(tmp_path: Any) -> None:
    model, inputs = build("opt")
    inject(model, Compacter(bottleneck=8), seed=5)
    names = [name for name in ModelView(model).adapter_parameters if name.endswith("phm_A")]
    assert len(names) == 1
    assert sum(name.endswith("phm_A") for name in adapter_state_dict(model)) == 1
    draws = ModelView(model).adapter_parameters
    assert draws[names[0]].std().item() == pytest.approx(0.01, rel=0.4)
    limit = max(p.abs().max().item() for n, p in draws.items() if n.endswith("down_t"))
    assert 0.7 * (6 / 9) ** 0.5 < limit <= (6 / 9) ** 0.5  # Glorot's rule, one column of 32 / 4 rows
    randomise(model)
    save_adapter(model, tmp_path)
    fresh = build("opt")[0]
    load_adapter(fresh, tmp_path)
    assert len({id(m.slow.phm_A) for m in fresh.modules() if hasattr(m, "slow")}) == 1
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


BAD: dict[str, tuple[Callable[[], Compacter], str]] = {
    "no multiple": (lambda: Compacter(bottleneck=6), "bottleneck=6 was given with n=4.*such as 8"),
    "no width": (lambda: Compacter(bottleneck=0), "bottleneck=0 was given"),
    "no n": (lambda: Compacter(n=0), "n=0 was given"),
    "unknown place": (lambda: Compacter(placement=["layer"]), "list of 'attention' and 'mlp'"),  # type: ignore[list-item]
    "unknown activation": (lambda: Compacter(activation="cos"), "activation='cos' was given"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyper_parameters(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(PEFTError, match=message):
        make()


def test_an_n_that_does_not_divide_the_hidden_state_is_refused() -> None:
    model = build("llama")[0]
    with pytest.raises(PEFTError, match=r"n=3 was given, but .*o_proj.* width 32"):
        inject(model, Compacter(bottleneck=6, n=3))
    assert not ModelView(model).adapter_parameters


def t5_encoder() -> nn.Module:
    return t.T5EncoderModel(t.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=50))


def mini_lm() -> nn.Module:
    return t.BertModel(
        t.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    )


@pytest.mark.parametrize(("make", "m", "d", "places"), [(t5_encoder, 24, 768, 24), (mini_lm, 32, 384, 12)])
def test_counts(make: Callable[[], nn.Module], m: int, d: int, places: int) -> None:
    """n³ + 3 (d + m) for each adapter."""
    with torch.device("meta"):
        model = make()
    inject(model, Compacter(bottleneck=m, train_norms=False))
    count = sum(p.numel() for p in ModelView(model).adapter_parameters.values())
    assert count == 64 + places * 3 * (d + m) == {24: 57_088, 32: 15_040}[m]
