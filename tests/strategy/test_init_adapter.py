"""Runs that begin with an adapter from a file; the judges are the file's tensors and HF PEFT's outputs."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from families import build
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import IA3, LoRA, PEFTError, PEFTStrategy, adapter_state_dict, save_adapter
from lightning_peft.cli import PEFTCLI

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Module(L.LightningModule):
    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss", self(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> torch.utils.data.DataLoader[torch.Tensor]:
    return torch.utils.data.DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)), batch_size=4)


def trainer(strategy: PEFTStrategy, **options: Any) -> L.Trainer:
    return L.Trainer(**QUIET, strategy=strategy, **{"max_steps": 0, "enable_checkpointing": False, **options})


@pytest.fixture(params=[LoRA(r=2, target_modules=["0", "2"]), IA3(target_modules=["0", "2"])], ids=["LoRA", "IA3"])
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def trained(method: Any, tmp_path: Path) -> tuple[Module, dict[str, Path]]:
    """A module that was trained for three steps, and what was written of it."""
    module = Module()
    saver = ModelCheckpoint(tmp_path / "files", "one", every_n_train_steps=1)
    run = trainer(
        PEFTStrategy(method, train_also="head", merge_on_train_end=False),
        max_steps=3,
        enable_checkpointing=True,
        callbacks=[saver],
    )
    run.fit(module, batches())
    save_adapter(module, tmp_path / "directory")
    return module, {"directory": tmp_path / "directory", "file": Path(saver.best_model_path)}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_run_begins_with_what_was_trained(trained: tuple[Module, dict[str, Path]], kind: str) -> None:
    before, places = trained
    module = Module()
    run = trainer(PEFTStrategy(init_adapter=places[kind], train_also="head", merge_on_train_end=False))
    run.fit(module, batches())
    x = torch.randn(5, 8)
    torch.testing.assert_close(module(x), before(x), rtol=0, atol=0)
    state, judge = adapter_state_dict(module), adapter_state_dict(before)
    assert state.keys() == judge.keys()
    # It is trained on from there, and nothing else is.
    frozen = module.net[0].weight.detach().clone()
    trainer(PEFTStrategy(init_adapter=places[kind], train_also="head", merge_on_train_end=False), max_steps=2).fit(
        module := Module(), batches()
    )
    assert not torch.equal(module(x), before(x))
    assert torch.equal(module.net[0].weight, frozen)


def test_it_is_tested_and_named_by_the_command_line(trained: tuple[Module, dict[str, Path]], tmp_path: Path) -> None:
    before, places = trained
    tested = trainer(PEFTStrategy(init_adapter=places["directory"])).test(Module(), batches(), verbose=False)[0]
    expected = torch.stack([before(batch).square().mean() for batch in batches()]).mean().item()
    assert tested["loss"] == pytest.approx(expected, rel=1e-6)
    strategy = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"init_adapter": str(places["directory"])}}
    run = {"trainer": {"strategy": strategy}, "model": {"class_path": f"{Module.__module__}.Module"}}
    (tmp_path / "run.yaml").write_text(yaml.dump(run))
    command = ["fit", f"--config={tmp_path / 'run.yaml'}", "--print_config"]
    with pytest.raises(SystemExit) as end:
        PEFTCLI(command)
    assert not end.value.code


class Language(L.LightningModule):
    """A transformers model, and something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")[0]
        self.scale = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.scale(self.model(input_ids=batch, labels=batch).loss[None])[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_hf_peft_wrote(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build("llama")[0], peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    module, ids = Language(), torch.randint(1, 50, (2, 8))
    run = trainer(PEFTStrategy(init_adapter=tmp_path / "theirs", merge_on_train_end=False))
    with pytest.warns(UserWarning, match="so the rest gets none and is frozen: 'scale.weight'"):
        run.fit(module, torch.utils.data.DataLoader(ids, batch_size=2))
    with torch.no_grad():
        torch.testing.assert_close(module.model.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_with_its_checkpoint(trained: tuple[Module, dict[str, Path]], tmp_path: Path) -> None:
    before, places = trained
    saver = ModelCheckpoint(tmp_path / "new", "one", every_n_train_steps=1)
    options = {"enable_checkpointing": True, "callbacks": [saver]}
    strategy = PEFTStrategy(init_adapter=places["directory"], merge_on_train_end=False)
    trainer(strategy, max_steps=5, **options).fit(first := Module(), batches())
    again = PEFTStrategy(init_adapter=places["directory"], merge_on_train_end=False)
    trainer(again, max_steps=5).fit(module := Module(), batches(), ckpt_path=saver.best_model_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(module(x), first(x), rtol=0, atol=0)
    assert not torch.equal(module(x), before(x))


def test_what_does_not_fit_is_refused(trained: tuple[Module, dict[str, Path]], method: Any, tmp_path: Path) -> None:
    _, places = trained
    other = "lora" if isinstance(method, IA3) else "ia3"
    wanted = LoRA(r=2, target_modules=["0"]) if other == "lora" else other
    for kind in places.values():
        with pytest.raises(PEFTError, match=r"The model already has adapters of method|was given"):
            trainer(PEFTStrategy(wanted, init_adapter=kind)).fit(Module(), batches())
        with pytest.raises(PEFTError, match=r"another base model|has the shape|shape"):
            trainer(PEFTStrategy(init_adapter=kind)).fit(Module(width=16), batches())
        with pytest.raises(PEFTError, match="another base model"):
            trainer(PEFTStrategy(init_adapter=kind)).fit(Module(seed=1), batches())
    with pytest.raises(PEFTError, match=r"init_adapter='.*nowhere' does not exist"):
        trainer(PEFTStrategy(init_adapter=tmp_path / "nowhere")).fit(Module(), batches())
    with pytest.raises(PEFTError, match="init_adapter and base_weights were given"):
        PEFTStrategy(init_adapter="a", base_weights="b")
