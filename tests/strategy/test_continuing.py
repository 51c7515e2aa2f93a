"""A resumed run equals the run without a break, bit for bit, also where random numbers are drawn."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from launch import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import BATCH, Regression, Stop, adapter_state, assert_same, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from lightning_peft import AdaLoRA, LoRA, PEFTError, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tasks.batches.resumable import ResumableLoader

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS, EPOCH = 12, 5


class Random(Regression):
    """Draws from ``source`` in each step."""

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__()

    def build(self) -> nn.Module:
        built = super().build()
        assert isinstance(built, nn.Sequential)
        return built.insert(2, nn.Dropout(0.3)) if self.source == "dropout" else built

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = {
            "torch": lambda: torch.randn(()),
            "python": random.random,
            "numpy": lambda: float(numpy.random.standard_normal()),
        }.get(self.source, lambda: 0.0)
        return self.loss(batch[0] + noise())


METHODS = {
    "nothing": LoRA(r=2),
    "LoRA's dropout": LoRA(r=2, dropout=0.3),
    "AdaLoRA": AdaLoRA(init_r=4, target_r=2, dropout=0.2),
}
DATA = TensorDataset(torch.randn(EPOCH * BATCH, 8, generator=torch.Generator().manual_seed(0)))


def in_order() -> ResumableLoader:
    return ResumableLoader(DATA, batch_size=BATCH)


def fit(root: Path, source: str, make: Any, stop: int, *, seed: int, kind: Any = AdapterCheckpoint, **more: Any) -> Any:
    resume = {"ckpt_path": more.pop("ckpt_path", None)}
    strategy = PEFTStrategy(METHODS.get(source, METHODS["nothing"]), merge_on_train_end=False)
    saver = kind(root, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    run = trainer(root, strategy, callbacks=[saver, Stop(stop)], max_steps=STEPS, max_epochs=-1, **more)
    module = Random(source)
    torch.manual_seed(seed)
    loader = make()
    for generator in (torch.manual_seed, random.seed, numpy.random.seed):
        generator(seed)  # what a new process has drawn is its own
    run.fit(module, loader, **resume)
    assert run.global_step == stop
    return module


def straight_and_resumed(root: Path, source: str, make: Any, stop: int, **options: Any) -> None:
    straight = fit(root / "straight", source, make, STEPS, seed=1, **options)
    fit(root / "halves", source, make, stop, seed=1, **options)
    (path,) = (root / "halves").glob(f"step={stop}*")
    resumed = fit(root / "resumed", source, make, STEPS, seed=2, ckpt_path=path, **options)
    assert_same(adapter_state(resumed), adapter_state(straight))
    # Otherwise nothing was drawn that counts.
    other = fit(root / "other", source, make, STEPS, seed=2, **options)
    state = adapter_state(straight)
    assert any(not torch.equal(tensor, state[name]) for name, tensor in adapter_state(other).items())


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("source", ["dropout", "torch", "python", "numpy", "LoRA's dropout", "AdaLoRA"])
def test_at_any_step_with_a_loader_that_knows_its_place(tmp_path: Path, source: str, kind: Any) -> None:
    straight_and_resumed(tmp_path, source, in_order, 8, kind=kind)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [EPOCH, 2 * EPOCH])
@pytest.mark.parametrize("source", ["nothing", "dropout"])
def test_at_the_end_of_an_epoch_with_shuffling(tmp_path: Path, source: str, stop: int, workers: int) -> None:
    straight_and_resumed(
        tmp_path, source, lambda: DataLoader(DATA, batch_size=BATCH, shuffle=True, num_workers=workers), stop
    )


@pytest.mark.parametrize("stop", [3, EPOCH, 8])
def test_with_a_stateful_loader(tmp_path: Path, stop: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    straight_and_resumed(tmp_path, "dropout", lambda: stateful(DATA, batch_size=BATCH, shuffle=True), stop)


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_steps": 4 * EPOCH, "max_epochs": -1}])
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("kept_by_step", [True, False])
def test_where_an_epoch_ends(tmp_path: Path, validates: bool, kept_by_step: bool, limit: Any) -> None:
    if validates and kept_by_step:
        pytest.skip("Lightning leaves a validation out that was to come after the checkpoint, and what it would draw.")
    if "max_steps" in limit and not validates and not kept_by_step:
        pytest.skip("Lightning goes on with the first batch of the epoch that has ended, with any strategy.")

    def fit_epochs(folder: str, stop: int, seed: int, **resume: Any) -> Any:
        every = {"every_n_train_steps": EPOCH} if kept_by_step else {"monitor": "val_loss" if validates else None}
        saver = AdapterCheckpoint(tmp_path / folder, save_top_k=-1, filename="{step}", **every)
        run = trainer(tmp_path, PEFTStrategy(LoRA(r=2)), callbacks=[saver, Stop(stop)], num_sanity_val_steps=2, **limit)
        module = Random("dropout")
        torch.manual_seed(seed)
        validation = DataLoader(DATA, BATCH) if validates else None
        run.fit(module, DataLoader(DATA, BATCH, shuffle=True), validation, **resume)
        return module

    straight = fit_epochs("straight", 4 * EPOCH, 1)
    fit_epochs("halves", 2 * EPOCH, 1)
    resumed = fit_epochs("resumed", 4 * EPOCH, 2, ckpt_path=tmp_path / "halves" / f"step={2 * EPOCH}")
    assert_same(adapter_state(resumed), adapter_state(straight))


def with_generator() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def with_sampler() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(DATA, batch_size=BATCH, sampler=RandomSampler(DATA, generator=generator))


@pytest.mark.parametrize("make", [with_generator, with_sampler])
def test_loaders_with_generators_of_their_own(tmp_path: Path, make: Any) -> None:
    straight_and_resumed(tmp_path, "torch", make, EPOCH)


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([list(DATA[index]) for index in torch.randperm(len(DATA)).tolist()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=BATCH), "An IterableDataset begins anew"),
        (lambda: DataLoader(DATA, BATCH, num_workers=1, persistent_workers=True), "Workers that persist draw"),
    ],
)
def test_data_whose_place_nobody_knows_are_told_of(tmp_path: Path, make: Any, message: str) -> None:
    fit(tmp_path, "nothing", make, EPOCH, seed=1)
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path / "resumed", "nothing", make, EPOCH + 1, seed=2, ckpt_path=next(tmp_path.glob(f"step={EPOCH}*")))


def with_two_generators() -> DataLoader[Any]:
    first, second = torch.Generator(), torch.Generator()
    return DataLoader(DATA, batch_size=BATCH, sampler=RandomSampler(DATA, generator=first), generator=second)


def test_generators_that_may_be_others_are_told_of(tmp_path: Path) -> None:
    fit(tmp_path, "nothing", with_generator, EPOCH, seed=1)
    path = tmp_path / f"step={EPOCH}"
    with pytest.warns(UserWarning, match="states of 1 generators of loaders, and the loaders of this run have 2"):
        fit(tmp_path / "more", "nothing", with_two_generators, EPOCH + 1, seed=2, ckpt_path=path)
    anew = {"ckpt_path": path, "reload_dataloaders_every_n_epochs": 1}
    with pytest.warns(UserWarning, match="Loaders are made anew every 1 epochs"):
        fit(tmp_path / "anew", "nothing", with_generator, EPOCH + 1, seed=2, **anew)


def test_a_plain_loader_within_an_epoch_is_said_once_to_be_inexact(tmp_path: Path) -> None:
    make = lambda: DataLoader(DATA, batch_size=BATCH)  # noqa: E731
    fit(tmp_path, "nothing", make, 3, seed=1)
    with pytest.warns(UserWarning, match="your dataloader is not resumable") as said:
        fit(tmp_path, "nothing", make, STEPS, seed=1, ckpt_path=tmp_path / "step=3")
    assert len([warning for warning in said if "not resumable" in str(warning.message)]) == 1


def test_a_run_with_other_processes_is_told_that_random_numbers_differ(tmp_path: Path) -> None:
    fit(tmp_path, "nothing", in_order, 3, seed=1, kind=ModelCheckpoint)
    (path,) = tmp_path.glob("step=3*")
    content = torch.load(path, weights_only=True)
    content["lightning_peft"]["generators"]["states"] *= 2
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"written by 2 processes, and this run has 1: random numbers"):
        fit(tmp_path, "nothing", in_order, STEPS, seed=1, ckpt_path=path)


@pytest.mark.parametrize("states", [3, {}, {"states": 3}, {"states": [3]}, {"states": [{"python": (1, 2)}]}])
def test_states_that_are_none_are_damage(tmp_path: Path, states: Any) -> None:
    fit(tmp_path, "nothing", in_order, 3, seed=1, kind=ModelCheckpoint)
    (path,) = tmp_path.glob("step=3*")
    content = torch.load(path, weights_only=True)
    content["lightning_peft"]["generators"] = states
    torch.save(content, path)
    with pytest.raises(PEFTError, match="states of random generators are damaged"):
        fit(tmp_path, "nothing", in_order, STEPS, seed=1, ckpt_path=path)


def test_a_checkpoint_without_generators_is_read(tmp_path: Path) -> None:
    fit(tmp_path, "nothing", in_order, 3, seed=1, kind=ModelCheckpoint)
    (path,) = tmp_path.glob("step=3*")
    content = torch.load(path, weights_only=True)
    del content["lightning_peft"]["generators"]
    torch.save(content, path)
    fit(tmp_path, "nothing", in_order, STEPS, seed=1, ckpt_path=path)


def test_an_evaluation_leaves_generators_alone(tmp_path: Path) -> None:
    fit(tmp_path, "nothing", in_order, 3, seed=1)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2)))
    torch.set_rng_state(expected)
    run.validate(Random("nothing"), ResumableLoader(DATA, batch_size=BATCH), tmp_path / "step=3", verbose=False)
    random.seed(3)
    drawn = random.random()
    random.seed(3)
    run.validate(Random("nothing"), ResumableLoader(DATA, batch_size=BATCH), tmp_path / "step=3", verbose=False)
    assert random.random() == drawn


def test_two_processes_go_on_as_they_would_have(tmp_path: Path) -> None:
    run_script(str(SCRIPTS / "continuing_script.py"), tmp_path)
    for rank in (0, 1):
        straight, resumed = (
            torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True) for run in ("straight", "resumed")
        )
        assert_same(resumed["adapters"], straight["adapters"])
        assert resumed["drawn"] == straight["drawn"]
    assert straight["drawn"] != torch.load(tmp_path / "straight-0.pt", weights_only=True)["drawn"]


@pytest.mark.slow
def test_fifty_kills_end_in_what_no_kill_ends_in(tmp_path: Path) -> None:
    said = run_script(str(SCRIPTS / "soak_script.py"), tmp_path, timeout=1500)
    assert "50 kills" in said
    straight, killed = (torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("straight", "killed"))
    assert_same(killed, straight)


class Once(IterableDataset[Tensor]):
    """Hands out what it has once, as a queue or a socket does."""

    def __init__(self, left: list[Tensor]) -> None:
        self.left = left

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(2 * BATCH):
            yield self.left.pop()


@pytest.mark.parametrize("strategy", ["stock", "adapters"])
def test_a_resumed_run_takes_no_more_from_a_stream_than_without_the_strategy(tmp_path: Path, strategy: str) -> None:
    left = list(torch.randn(8 * BATCH, 8))

    class Rows(Regression):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch)

    for epochs in (1, 2):
        saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
        peft = "auto" if strategy == "stock" else PEFTStrategy(LoRA(r=2))
        run = trainer(tmp_path, peft, max_epochs=epochs, callbacks=[saver])
        last = tmp_path / "last.ckpt"
        run.fit(Rows(), DataLoader(Once(left), batch_size=BATCH), ckpt_path=last if last.exists() else None)
    # An epoch takes two batches.
    assert len(left) == (8 - 2 * 2) * BATCH


def test_a_checkpoint_is_read_for_a_module_without_a_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2)))
    run.fit(Regression(), DataLoader(DATA, batch_size=BATCH))
    run.save_checkpoint(tmp_path / "one.ckpt")
    strategy = trainer(tmp_path, PEFTStrategy(LoRA(r=2))).strategy
    strategy.connect(Regression())
    assert "state_dict" in strategy.load_checkpoint(tmp_path / "one.ckpt")
