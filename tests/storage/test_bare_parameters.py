"""Parameters that stand by themselves, such as CLIP's `logit_scale`, in `train_also`: trained, saved, gone on with."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, SteppedRegression, assert_same, inputs, loader, trainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lightning_peft import LoRA, PEFTError, PEFTStrategy, eject, inject, load_adapter, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint


class Scaled(SteppedRegression):
    """Has a temperature of its own beside its network."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(4))])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.logit_scale + self.prompts[0]


class Inside(SteppedRegression):
    """Has it within the model that is adapted, as CLIP has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 8).long().abs() % 20
        return self.model(input_ids=ids).pooler_output * self.model.logit_scale


def build() -> Any:
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval()
    model.logit_scale = nn.Parameter(torch.ones(()))
    return model


NAMES = {Scaled: ["logit_scale", "prompts.0"], Inside: ["model.logit_scale"]}


def strategy(kind: type, **options: Any) -> PEFTStrategy:
    targets = "q_proj" if kind is Inside else "net.*"
    also = ["logit_scale"] if kind is Inside else ["logit_scale", "prompts"]
    return PEFTStrategy(LoRA(r=2, target_modules=targets), train_also=also, **options)


@pytest.mark.parametrize("saver", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("kind", [Scaled, Inside])
def test_trained_saved_and_gone_on_with(tmp_path: Path, kind: type, saver: Any) -> None:
    def fit(folder: str, epochs: int, **resume: Any) -> Any:
        module = kind()
        saved = saver(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, strategy(kind, merge_on_train_end=False), max_epochs=epochs, callbacks=[saved])
        run.fit(module, loader(), **resume)
        return module

    straight = fit("straight", 2)
    for name in NAMES[kind]:
        assert not torch.equal(straight.get_parameter(name), kind().get_parameter(name))
    (first, last) = sorted((tmp_path / "straight").iterdir())
    assert_same(dict(fit("resumed", 2, ckpt_path=first).state_dict()), dict(straight.state_dict()))
    loaded = kind.load_from_checkpoint(last)  # type: ignore[attr-defined]
    assert torch.equal(loaded.eval()(inputs()), straight.eval()(inputs()))
    if saver is AdapterCheckpoint:
        fresh = kind()
        load_adapter(fresh, last)
        assert torch.equal(fresh.eval()(inputs()), straight.eval()(inputs()))
    eject(straight)
    assert_same(dict(straight.state_dict()), dict(kind().state_dict()))


def test_a_directory_is_for_the_model_itself_too(tmp_path: Path) -> None:
    model = build()
    inject(model, LoRA(r=2, target_modules="q_proj"), train_also=["logit_scale"])
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    save_adapter(model, tmp_path / "a")
    fresh = build()
    load_adapter(fresh, tmp_path / "a")
    assert fresh.logit_scale == 3
    # Which HF PEFT would leave at 1 without a word, if it read the directory.
    with pytest.raises(KeyError, match="LIGHTNING_PEFT"):
        peft.PeftModel.from_pretrained(build(), tmp_path / "a")


def test_beside_the_model_hf_peft_reads_its_adapter(tmp_path: Path) -> None:
    class Beside(Inside):
        def __init__(self) -> None:
            super().__init__()
            del self.model.logit_scale
            self.model.logit_scale = 1.0
            self.scale = nn.Parameter(torch.ones(()))

    module = Beside()
    inject(module, LoRA(r=2, target_modules="q_proj"), train_also=["scale"])
    with torch.no_grad():
        module.scale.fill_(3.0)
    save_adapter(module, tmp_path / "a")
    fresh = Beside()
    load_adapter(fresh, tmp_path / "a")
    assert fresh.scale == 3
    peft.PeftModel.from_pretrained(build(), tmp_path / "a")


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("logit_scal", r"train_also: 'logit_scal' matches no module.*logit_scale"),
        ("0.weight", r"'0\.weight' shares a parameter with '1'"),
    ],
)
def test_what_cannot_be_trained_alone(also: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.logit_scale = nn.Parameter(torch.ones(()))
    with pytest.raises(PEFTError, match=message):
        inject(model, LoRA(r=2, target_modules="2"), train_also=[also])


def test_a_module_that_is_named_has_its_parameters_once() -> None:
    model = Regression().net
    inject(model, LoRA(r=2, target_modules="0"), train_also=["2", "2.bias", "re:0.bias"])
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".peft." not in name} == {
        "2.weight",
        "2.bias",
        "0.bias",
    }
