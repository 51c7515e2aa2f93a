"""At its start, a fit says which new parts it leaves frozen, and the line to write."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from modules import Regression, loader, trainer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from lightning_peft import LoRA, NewTokens, PEFTError, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Classifier(pl.LightningModule):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = self.build(base)

    def build(self, base: str) -> nn.Module:
        return LlamaForSequenceClassification.from_pretrained(base, num_labels=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=(x * 4).long().abs() % 19 + 1).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnHead(Classifier):
    def build(self, base: str) -> nn.Module:
        return nn.ModuleDict({"encoder": LlamaModel.from_pretrained(base), "head": nn.Linear(16, 2)})

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 4).long().abs() % 19 + 1
        return self.model["head"](self.model["encoder"](input_ids=ids).last_hidden_state[:, -1])


class Resized(Classifier):
    def build(self, base: str) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(22)
        return model


class Segmentation(Regression):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten())


def said(module: pl.LightningModule, strategy: PEFTStrategy, root: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(root, strategy, max_steps=1).fit(module, loader())
    return [text for w in caught if "Train " in (text := str(w.message))]


def test_a_head_without_pretrained_values(base: Path, tmp_path: Path) -> None:
    (text,) = said(Classifier(str(base)), PEFTStrategy(LoRA(r=2)), tmp_path)
    assert "no values for 'model.score'" in text
    assert "train_also=['model.score']" in text
    assert said(Classifier(str(base)), PEFTStrategy(LoRA(r=2), train_also=["model.score"]), tmp_path) == []


def test_a_head_beside_the_model(base: Path, tmp_path: Path) -> None:
    (text,) = said(OwnHead(str(base)), PEFTStrategy(LoRA(r=2, target_modules=["q_proj"])), tmp_path)
    assert "train_also=['model.head']" in text
    # It has an adapter.
    assert said(OwnHead(str(base)), PEFTStrategy(LoRA(r=2)), tmp_path) == []


def test_what_the_user_froze_is_left_alone(base: Path, tmp_path: Path) -> None:
    module = OwnHead(str(base))
    module.model["head"].requires_grad_(False)
    assert said(module, PEFTStrategy(LoRA(r=2, target_modules=["q_proj"])), tmp_path) == []


def test_rows_of_an_enlarged_vocabulary(base: Path, tmp_path: Path) -> None:
    texts = said(Resized(str(base)), PEFTStrategy(LoRA(r=2)), tmp_path)
    assert [text.split("'")[1] for text in texts] == ["model.model.embed_tokens", "model.lm_head"]
    assert all("NewTokens(token_indices=list(range(20, 22)))" in text for text in texts)
    methods = [LoRA(r=2), NewTokens(token_indices=list(range(20, 22)))]
    (text,) = said(Resized(str(base)), PEFTStrategy(methods), tmp_path)
    assert "'model.lm_head'" in text


def test_a_last_layer_that_a_preset_leaves_out(tmp_path: Path) -> None:
    (text,) = said(Segmentation(), PEFTStrategy(LoRA(r=2)), tmp_path)
    assert "'net.2' (Conv1d), the last layer, is frozen" in text
    assert "train_also=['net.2']" in text
    for strategy in (
        PEFTStrategy(LoRA(r=2), train_also="net.2"),
        PEFTStrategy(LoRA(r=1, target_modules=["net.0"])),
        PEFTStrategy(LoRA(r=1, target_modules=["all-linear", "net.2"])),
    ):
        assert said(Segmentation(), strategy, tmp_path) == []
    assert said(Regression(), PEFTStrategy(LoRA(r=2)), tmp_path) == []


@pytest.mark.parametrize("names", [("model.score",), "model.score"])
def test_a_module_names_what_is_trained_with_its_adapters(base: Path, tmp_path: Path, names: Any) -> None:
    class Naming(Classifier):
        train_also = names

    module = Naming(str(base))
    trainer(tmp_path, PEFTStrategy(LoRA(r=2)), max_steps=1).fit(module, loader())
    assert module.model.score.weight.requires_grad
    module = Naming(str(base))
    trainer(tmp_path, PEFTStrategy(LoRA(r=2), train_also=[]), max_steps=1).fit(module, loader())
    assert not module.model.score.weight.requires_grad


@pytest.mark.parametrize("directory", [True, False])
def test_a_checkpoint_beside_another_frozen_head_is_refused(base: Path, directory: bool, tmp_path: Path) -> None:
    make = AdapterCheckpoint if directory else pl.callbacks.ModelCheckpoint

    def run(folder: str, **options: Any) -> tuple[Classifier, str]:
        checkpoint = make(dirpath=tmp_path / folder, save_last=True)
        torch.manual_seed(6)
        module = Classifier(str(base))
        trainer(tmp_path, PEFTStrategy(LoRA(r=2), **options), max_steps=1, callbacks=[checkpoint]).fit(module, loader())
        return module, checkpoint.last_model_path

    _, path = run("frozen")
    torch.manual_seed(7)
    with pytest.raises(PEFTError, match=r"beside another 'model\.score'.*train_also=\['model\.score'\]"):
        Classifier.load_from_checkpoint(path)
    module, path = run("trained", train_also="score")
    torch.manual_seed(7)
    loaded, x = Classifier.load_from_checkpoint(path).eval(), torch.randn(3, 8)
    assert torch.allclose(loaded(x), module.eval()(x), atol=1e-5)


class FrozenBackbone(Regression):
    """Its author trained a head, and a norm, on a backbone that was frozen by hand."""

    def build(self) -> nn.Module:
        backbone = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 64))
        backbone.requires_grad_(False)[1].requires_grad_(True)
        return nn.Sequential(backbone, nn.Linear(64, 4))


def test_what_was_to_be_trained_beside_a_frozen_backbone(tmp_path: Path) -> None:
    method = LoRA(r=2, target_modules=["net.0.0", "net.0.2"])
    (text,) = said(FrozenBackbone(), PEFTStrategy(method), tmp_path)
    assert "beside what you had frozen by hand" in text
    assert "train_also=['net.0.1', 'net.1']" in text
    assert said(FrozenBackbone(), PEFTStrategy(method, train_also=["net.0.1", "net.1"]), tmp_path) == []
    (text,) = said(FrozenBackbone(), PEFTStrategy(LoRA(r=2)), tmp_path)
    assert "train_also=['net.0.1']" in text
