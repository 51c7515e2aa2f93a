"""Adapters of transformers 4's experts, a module each, on today's: plain float64 modules and HF PEFT judge them."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft import LoRA, PEFTError, inject, load_adapter, save_adapter
from lightning_peft.cli.tools.export import export

EXPERTS = 4
MIXTRAL, QWEN = ("block_sparse_moe", "w1", "w3", "w2"), ("mlp", "gate_proj", "up_proj", "down_proj")
NAMES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN}
Pairs = dict[str, tuple[Tensor, Tensor, float]]


class PlainExperts(nn.Module):
    """A module for each layer of each expert, with its change added, in float64."""

    def __init__(self, experts: Any, changes: dict[tuple[int, int], Tensor]) -> None:
        super().__init__()
        gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
        self.layers = nn.ModuleList()
        for index in range(len(down)):
            layers = nn.ModuleList()
            for at, weight in enumerate((*gate_up[index].chunk(2), down[index])):
                layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64))
                layers[-1].weight.data = weight + changes.get((index, at), torch.zeros(()))
            self.layers.append(layers)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for index, weight in zip(chosen[token], weights[token], strict=True):
                gate, up, down = self.layers[index]
                out[token] += weight * down(functional.silu(gate(x[token])) * up(x[token]))
        return out


def write(path: Path, family: str, *, drop: Any = lambda host: False, **config: Any) -> Pairs:
    """Write what HF PEFT wrote on transformers 4; return A, B and scale of each module."""
    model, _ = build(family)
    around, *layers = NAMES[family]
    generator = torch.Generator().manual_seed(5)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, **config}
    config.setdefault("target_modules", ["q_proj", "gate", *layers])
    tensors: dict[str, Tensor] = {}
    pairs: Pairs = {}
    for block, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        half = experts.gate_up_proj.shape[1] // 2
        sizes = [(experts.gate_up_proj.shape[2], half)] * 2 + [(half, experts.down_proj.shape[1])]
        hosts = {
            f"{around}.experts.{i}.{n}": size for i in range(EXPERTS) for n, size in zip(layers, sizes, strict=True)
        }
        hosts[f"{around}.gate"] = (sizes[0][0], EXPERTS)
        hosts["self_attn.q_proj"] = layer.self_attn.q_proj.weight.shape[::-1]
        for name, (d_in, d_out) in hosts.items():
            host = f"model.layers.{block}.{name}"
            if drop(host):
                continue
            rank = next((r for key, r in config["rank_pattern"].items() if host.endswith(key)), config["r"])
            alpha = next((a for key, a in config.get("alpha_pattern", {}).items() if host.endswith(key)), 8)
            a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            tensors |= {f"base_model.model.{host}.lora_{k}.weight": t for k, t in (("A", a), ("B", b))}
            pairs[host] = a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return pairs


def judged(family: str, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the logits of the base and those with the adapter, each expert a plain module."""
    model, inputs = build(family)
    around, *layers = NAMES[family]
    model.double().set_experts_implementation("eager")
    base = outputs(model, inputs)
    for block, layer in enumerate(model.model.layers):
        lead, changes = f"model.layers.{block}", {}
        made = {host: scale * b.double() @ a.double() for host, (a, b, scale) in pairs.items() if host.startswith(lead)}
        for index in range(EXPERTS):
            for at, name in enumerate(layers):
                if (change := made.get(f"{lead}.{around}.experts.{index}.{name}")) is not None:
                    changes[index, at] = change
        layer.mlp.experts = PlainExperts(layer.mlp.experts, changes)
        for name, weight in (
            (f"{around}.gate", layer.mlp.gate.weight),
            ("self_attn.q_proj", layer.self_attn.q_proj.weight),
        ):
            weight.data += made.get(f"{lead}.{name}", torch.zeros(()))
    return base, outputs(model, inputs)


def loaded(family: str, path: Path) -> tuple[Any, Tensor]:
    model, inputs = build(family)
    model.double().set_experts_implementation("eager")
    load_adapter(model, path)
    return model, outputs(model.eval(), inputs)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks by layer": {"rank_pattern": {"w1": 3, "gate_proj": 3, "gate": 1}, "alpha_pattern": {"w3": 5, "up_proj": 5}},
    "ranks by expert": {"rank_pattern": {"experts.1.w2": 4, "experts.1.down_proj": 4, "experts.0.w1": 1}},
    "an alpha of zero": {"alpha_pattern": {"experts.0.w1": 0, "experts.0.gate_proj": 0}},
    "some experts": {"drop": lambda host: ".experts.2." in host or "experts.0.w3" in host},
    "gates alone": {"drop": lambda host: "experts" in host and not host.endswith(("w1", "gate_proj"))},
    "one layer": {
        "drop": lambda host: "layers.1.mlp" in host or "layers.1.block" in host,
        "exclude_modules": r".*layers\.1\.(mlp|block_sparse_moe)\..*",
    },
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_each_expert_is_changed_as_it_was_trained(family: str, case: str, tmp_path: Path) -> None:
    pairs = write(tmp_path / "old", family, **CASES[case])
    base, expected = judged(family, pairs)
    model, got = loaded(family, tmp_path / "old")
    assert (expected - base).abs().max() > 1e-2
    assert (got - expected).abs().max() <= 1e-6
    save_adapter(model, tmp_path / "new")
    assert torch.equal(loaded(family, tmp_path / "new")[1], got)


@pytest.mark.parametrize(("family", "layout"), [("mixtral", "mixtral"), ("qwen3_moe", "qwen")])
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "gate.weight", "experts.*"], 2 * 14),
        (["experts.down_proj"], 2 * 4),
        (["experts.gate_up_proj"], 2 * 8),
    ],
)
def test_a_copy_with_a_module_per_expert(
    family: str, layout: Any, targets: list[str], count: int, tmp_path: Path
) -> None:
    model, inputs = build(family)
    inject(model, LoRA(r=2, alpha=6, target_modules=targets, rank_pattern={"experts.*": 3}))
    randomise(model)
    expected = outputs(model.eval(), inputs)
    save_adapter(model, tmp_path / "new")
    for reader in ("peft", "sglang" if "q_proj" not in targets else "vllm"):
        export(str(tmp_path / "new"), str(tmp_path / reader), reader, experts=layout)
        config = json.loads((tmp_path / reader / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / reader / "adapter_model.safetensors")
        pairs: Pairs = {}
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                host = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                pairs[host] = a, tensors[name.replace("lora_A", "lora_B")], 1.0 if reader != "peft" else 6 / len(a)
        assert len(pairs) == count
        assert not config.get("target_parameters")
        base, judge = judged(family, pairs)
        assert (judge - base).abs().max() > 1e-3
        assert (judge - expected).abs().max() <= 2e-5
    again, _ = build(family)
    load_adapter(again, tmp_path / "peft")
    assert (outputs(again.eval(), inputs) - expected).abs().max() <= 1e-5


def test_only_experts_are_divided(tmp_path: Path) -> None:
    model, _ = build("llama")
    inject(model, LoRA(r=2))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(PEFTError, match="has no LoRA of experts in one parameter"):
        export(str(tmp_path / "a"), str(tmp_path / "b"), experts="qwen")
    assert not (tmp_path / "b").exists()


def test_as_hf_peft_reads_it(tmp_path: Path) -> None:
    """Its releases from 0.19 on convert such files while they load them, if every expert has the same rank."""
    write(tmp_path, "mixtral")
    model, inputs = build("mixtral")
    judge = outputs(peft.PeftModel.from_pretrained(model, tmp_path).eval(), inputs)
    model, inputs = build("mixtral")
    load_adapter(model, tmp_path)
    assert (outputs(model.eval(), inputs) - judge).abs().max() <= 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(match: str, change: Any) -> None:
        write(tmp_path, "mixtral")
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors, "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1")
        save_file(tensors, file)
        with pytest.raises(PEFTError, match=match):
            load_adapter(model, tmp_path)
        assert model.state_dict().keys() == before.keys()

    refused("have the shapes None", lambda t, host: t.pop(f"{host}.lora_B.weight"))
    refused("have the shapes None", lambda t, host: t.pop(f"{host}.lora_A.weight"))
    refused("have the shapes", lambda t, host: t.update({f"{host}.lora_A.weight": torch.ones(2, 33)}))
    refused(
        "one of the 4 experts",
        lambda t, host: t.update(
            {
                f"{host.replace('s.1.', 's.9.')}.{k}": t[f"{host}.{k}"].clone()
                for k in ("lora_A.weight", "lora_B.weight")
            }
        ),
    )
    refused(
        "which has no such layer",
        lambda t, host: t.update(
            {f"{host}x.{k}": t[f"{host}.{k}"].clone() for k in ("lora_A.weight", "lora_B.weight")}
        ),
    )
    refused("A and B of plain LoRA alone", lambda t, host: t.update({f"{host}.lora_magnitude_vector": torch.ones(64)}))


def test_dropout_that_cannot_be_is_said(tmp_path: Path) -> None:
    write(tmp_path, "mixtral", lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 is left out"):
        load_adapter(build("mixtral")[0], tmp_path)
    write(tmp_path, "mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(build("mixtral")[0], tmp_path)
