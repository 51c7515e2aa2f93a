from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from modules import Halving, Regression, SteppedRegression, adapter_state, assert_same, base_state, loader, trainer
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_peft import BitFit, FullFinetuning, LoRA, PEFTError, PEFTStrategy, inject
from lightning_peft.strategy.optimizers.optim import restrict_to_trainable, state_by_name, state_by_position
from lightning_peft.strategy.optimizers.param_groups import settle_state

ADAPTERS = [f"net.{layer}.peft.default.lora_{which}" for layer in (0, 2) for which in "AB"]


def three_layers() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c")})


def names_in(group: dict[str, Any], model: nn.Module) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return sorted(names[id(p)] for p in group["params"])


def adapters_of(name: str) -> list[str]:
    return [f"{name}.peft.default.lora_{which}" for which in "AB"]


# --- param groups -------------------------------------------------------------------------------------------------


def fitted(tmp_path: Path, configure: Callable[[Any], Any], **options: Any) -> Any:
    module = Regression()
    module.configure_optimizers = lambda: configure(module)  # type: ignore[method-assign]
    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end=False), **options)
    run.fit(module, loader())
    return module, run


def test_frozen_parameters_are_dropped(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, lambda m: AdamW(m.parameters(), lr=0.1))
    (optimizer,) = run.optimizers
    (group,) = optimizer.param_groups
    assert names_in(group, module) == ADAPTERS
    assert {id(p) for p in optimizer.state} == {id(p) for p in group["params"]}


def test_an_optimizer_of_trainable_parameters_only_is_left_alone(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    assert names_in(run.optimizers[0].param_groups[0], module) == ADAPTERS


def test_groups_of_the_users(tmp_path: Path) -> None:
    def configure(m: Any) -> Optimizer:
        decay = [p for n, p in m.named_parameters() if n.startswith("net.0") and "bias" not in n]
        rest = [p for n, p in m.named_parameters() if n.startswith("net.2")]
        biases = [p for n, p in m.named_parameters() if n == "net.0.bias"]
        return AdamW([{"params": decay, "weight_decay": 0.3}, {"params": biases}, {"params": rest, "lr": 0.7}], lr=0.1)

    module, run = fitted(tmp_path, configure)
    first, second = run.optimizers[0].param_groups
    assert names_in(first, module) == ADAPTERS[:2]
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.3)
    assert names_in(second, module) == ADAPTERS[2:]
    assert (second["lr"], second["weight_decay"]) == (0.7, 0.01)


def test_several_optimizers(tmp_path: Path) -> None:
    class Manual(Regression):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch[0]))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [SGD(self.net[0].parameters(), lr=0.1), AdamW(self.net[2].parameters(), lr=0.1)]

    module = Manual()
    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end=False))
    run.fit(module, loader())
    assert [names_in(o.param_groups[0], module) for o in run.optimizers] == [ADAPTERS[:2], ADAPTERS[2:]]
    assert all(t.any() for t in adapter_state(module).values())


def test_named_parameters(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, lambda m: AdamW(m.named_parameters(), lr=0.1))
    (group,) = run.optimizers[0].param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert sorted(group["param_names"]) == ADAPTERS


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_made_before_injection_gets_the_adapters_in_their_hosts_groups(named: bool) -> None:
    model = three_layers()
    groups = [
        {"params": list(layer.named_parameters(prefix=name) if named else layer.parameters()), "lr": lr}
        for (name, layer), lr in zip(model.items(), (0.1, 0.2, 0.3), strict=True)
    ]
    optimizer = SGD(groups)
    inject(model, LoRA(r=2, target_modules=["a", "c"]))
    restrict_to_trainable([optimizer], [], model)
    assert [(g["lr"], names_in(g, model)) for g in optimizer.param_groups] == [
        (0.1, adapters_of("a")),
        (0.3, adapters_of("c")),
    ]
    if named:
        assert [g["param_names"] for g in optimizer.param_groups] == [adapters_of("a"), adapters_of("c")]


def test_the_same_through_the_trainer(tmp_path: Path) -> None:
    class Early(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.early = AdamW(self.parameters(), lr=0.05)

        def configure_optimizers(self) -> Any:
            return self.early

    early, late = Early(), Regression()
    for module in (early, late):
        trainer(tmp_path).fit(module, loader())
    assert_same(adapter_state(early), adapter_state(late))
    assert any(t.any() for t in adapter_state(early).values())


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    def frozen_only(m: Any) -> Optimizer:
        # Adapters have an optimizer of their own; this one holds frozen parameters only.
        return [SGD(m.net[0].parameters(), lr=0.1), SGD([m.net[2].bias], lr=0.1)]

    module = Regression()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: frozen_only(module)  # type: ignore[method-assign]
    strategy = PEFTStrategy(LoRA(r=2, target_modules="net.0"))
    with pytest.raises(
        PEFTError, match=r"left with nothing to train.*net\.2\.bias.*belong to parameters that SGD holds"
    ):
        trainer(tmp_path, strategy).fit(module, loader())


class Muons(Regression):
    """Has an optimizer for matrices and another one for the rest, as Muon is used."""

    automatic_optimization = False

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch[0]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [
            torch.optim.SGD([p for p in parameters if p.dim() == 2], 0.1),
            torch.optim.AdamW([p for p in parameters if p.dim() != 2], 0.1),
        ]


def test_an_optimizer_beside_that_of_the_adapters_has_to_train_something(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"AdamW.*belong to parameters that SGD holds.*\[LoRA\(\.\.\.\), BitFit\(\)\]"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(Muons(), loader())
    module = Muons()
    trainer(tmp_path, PEFTStrategy([LoRA(r=2), BitFit()])).fit(module, loader())
    assert not torch.equal(module.net[0].bias, Muons().net[0].bias)
    assert not torch.equal(module.net[0].weight, Muons().net[0].weight)


def test_an_adapter_that_no_optimizer_would_train_is_an_error() -> None:
    model = three_layers()
    optimizer = SGD(model["b"].parameters(), lr=0.1)
    inject(model, LoRA(r=2, target_modules=["a"]))
    with pytest.raises(PEFTError, match=r"'a\.peft\.default\.lora_A' is trained, but no optimizer.*self\.parameters"):
        restrict_to_trainable([optimizer], [], model)


def test_only_frozen_parameters_of_hosts_get_their_adapters(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, lambda m: SGD([m.net[0].weight, m.net[2].weight], lr=0.1))
    assert names_in(run.optimizers[0].param_groups[0], module) == ADAPTERS


def test_zero_redundancy_is_refused() -> None:
    model = three_layers()
    inject(model, LoRA(r=2))
    optimizer = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(PEFTError, match=r"ZeroRedundancyOptimizer.*Use the optimizer that it wraps"):
        restrict_to_trainable([optimizer], [], model)


def test_lbfgs_trains(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1))
    assert names_in(run.optimizers[0].param_groups[0], module) == ADAPTERS
    assert all(t.any() for t in adapter_state(module).values())


class Early(Regression):
    """Makes its optimizer in ``__init__``, when there are no adapters."""

    def __init__(self, make: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.early = make(self.parameters())

    def configure_optimizers(self) -> Any:
        return self.early


@pytest.mark.parametrize("early", [False, True])
def test_state_that_is_kept_from_the_start_is_that_of_adapters(tmp_path: Path, early: bool) -> None:
    def make(parameters: Any) -> Optimizer:
        return Adagrad(parameters, lr=0.1, initial_accumulator_value=0.3)

    module = Early(make) if early else Regression()
    module.configure_optimizers = lambda: module.early if early else make(module.parameters())  # type: ignore[method-assign]
    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end=False))
    run.fit(module, loader())
    (optimizer,) = run.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    assert sorted(names[id(p)] for p in optimizer.state) == ADAPTERS
    # What torch makes of adapters alone.
    alone = Regression()
    alone.configure_optimizers = lambda: make([p for p in alone.parameters() if p.requires_grad])  # type: ignore[method-assign]
    trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end=False)).fit(alone, loader())
    assert_same(adapter_state(module), adapter_state(alone))
    saved = run.strategy.optimizer_state(optimizer)
    assert {state["step"].item() for state in saved["state"].values()} == {4}


def test_state_from_the_start_that_cannot_be_guessed_is_refused() -> None:
    model = three_layers()
    optimizer = Adagrad(model.parameters(), lr=0.1)
    inject(model, LoRA(r=2))
    for state in optimizer.state.values():
        state["sum"].copy_(torch.rand(state["sum"].shape))
    with pytest.raises(PEFTError, match=r"Adagrad keeps state.*Make the optimizer in configure_optimizers"):
        restrict_to_trainable([optimizer], [], model)


def test_state_of_steps_that_were_made_is_not_taken_for_a_start() -> None:
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdamW([one, other], lr=0.1)
    one.grad = torch.ones(2)
    optimizer.step()
    settle_state(optimizer)
    assert set(optimizer.state) == {one}


def test_a_subset_is_trained_as_without_the_strategy(tmp_path: Path) -> None:
    """Nothing is added to what the user's optimizer holds of the base."""

    def configured(module: Regression) -> Regression:
        module.configure_optimizers = lambda: SGD([module.net[2].weight], lr=0.1)  # type: ignore[method-assign]
        return module

    ours, plain = configured(Regression()), configured(Regression())
    trainer(tmp_path, PEFTStrategy(FullFinetuning())).fit(ours, loader())
    trainer(tmp_path, "auto").fit(plain, loader())
    assert_same(base_state(ours), base_state(plain))
    assert not torch.equal(ours.net[2].weight, Regression().net[2].weight)


def test_what_a_method_trains_and_no_optimizer_holds_is_named(tmp_path: Path) -> None:
    module = Regression()
    module.configure_optimizers = lambda: SGD(module.net[2].parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"1 parameters that the method trains are in no optimizer.*net\.0\.bias"):
        trainer(tmp_path, PEFTStrategy(BitFit())).fit(module, loader())
    assert torch.equal(module.net[0].bias, Regression().net[0].bias)
    assert not torch.equal(module.net[2].bias, Regression().net[2].bias)


def test_without_an_optimizer_nothing_is_trained_as_without_the_strategy(tmp_path: Path) -> None:
    module = Regression()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    run = trainer(tmp_path, PEFTStrategy(FullFinetuning()))
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert_same(base_state(module), base_state(Regression()))


def test_parameters_of_others_stay_in_their_groups() -> None:
    model, own = three_layers(), torch.zeros(2)
    inject(model, LoRA(r=2))
    optimizer = SGD([*model.parameters(), own], lr=0.1)
    restrict_to_trainable([optimizer], [], model)
    assert optimizer.param_groups[0]["params"][-1] is own


# --- groups that a method splits ----------------------------------------------------------------------------------


def two_named_groups(module: Any) -> Optimizer:
    named = [(n, p) for n, p in module.named_parameters() if n.startswith("net.")]
    groups = {"first": [p for n, p in named if n.startswith("net.0")], "rest": [p for n, p in named if "net.2" in n]}
    return AdamW([{"params": parameters, "name": name} for name, parameters in groups.items()], lr=0.01)


def test_groups_that_are_split_have_names_of_their_own(tmp_path: Path) -> None:
    module, monitor = Regression(), LearningRateMonitor()
    module.configure_optimizers = lambda: two_named_groups(module)  # type: ignore[method-assign]
    options: dict[str, Any] = {"callbacks": [monitor], "logger": CSVLogger(tmp_path), "enable_checkpointing": False}
    trainer(tmp_path, PEFTStrategy(LoRA(r=2, loraplus_lr_ratio=16)), log_every_n_steps=1, **options).fit(
        module, loader()
    )
    rates = {name.removeprefix("lr-AdamW/"): values[0] for name, values in monitor.lrs.items()}
    assert rates == {"first": 0.01, "rest": 0.01, "first_x16": 0.16, "rest_x16": 0.16}


def test_a_ratio_is_applied_once_to_an_optimizer_that_is_used_again(tmp_path: Path) -> None:
    module = Early(lambda parameters: AdamW(parameters, lr=0.01))
    for _ in range(2):
        run = trainer(tmp_path, PEFTStrategy(LoRA(r=2, loraplus_lr_ratio=16)))
        run.fit(module, loader())
        assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.01, 0.16]


# --- schedulers ---------------------------------------------------------------------------------------------------

# Each makes a scheduler; `pick` reduces a list with one entry per group to the groups there are.
SCHEDULES: dict[str, Callable[[Optimizer, Callable[[list[Any]], list[Any]]], Any]] = {
    "lambda": lambda o, pick: schedulers.LambdaLR(o, pick([lambda e: 0.9**e, lambda e: 0.5**e, lambda e: 1 / (1 + e)])),
    "multiplicative": lambda o, pick: schedulers.MultiplicativeLR(
        o, pick([lambda e: 0.9, lambda e: 0.8, lambda e: 0.7])
    ),
    "step": lambda o, pick: schedulers.StepLR(o, 2, 0.5),
    "multistep": lambda o, pick: schedulers.MultiStepLR(o, [1, 4], 0.5),
    "exponential": lambda o, pick: schedulers.ExponentialLR(o, 0.8),
    "linear": lambda o, pick: schedulers.LinearLR(o, 0.1, 1.0, 4),
    "polynomial": lambda o, pick: schedulers.PolynomialLR(o, 6),
    "cosine": lambda o, pick: schedulers.CosineAnnealingLR(o, 5),
    "restarts": lambda o, pick: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "onecycle": lambda o, pick: schedulers.OneCycleLR(o, pick([0.4, 0.5, 0.6]), total_steps=9),
    "cyclic": lambda o, pick: schedulers.CyclicLR(
        o, pick([0.01, 0.02, 0.03]), pick([0.1, 0.2, 0.3]), step_size_up=3, cycle_momentum=True
    ),
    "sequential": lambda o, pick: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 4)], [3]
    ),
    "chained": lambda o, pick: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "sequential of lambdas": lambda o, pick: schedulers.SequentialLR(
        o,
        [
            schedulers.LambdaLR(o, pick([lambda e: 0.9**e, lambda e: 0.5**e, lambda e: 0.8**e])),
            schedulers.StepLR(o, 1, 0.5),
        ],
        [3],
    ),
    "plateau": lambda o, pick: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=0, min_lr=pick([0.01, 0.02, 0.03])),
}


@pytest.mark.parametrize("dropped", [(1,), (0,), (0, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_go_on_without_the_emptied_groups(name: str, dropped: tuple[int, ...]) -> None:
    model, lrs = three_layers(), (0.1, 0.2, 0.3)
    kept = [i for i in range(3) if i not in dropped]

    def make(parameters: list[Any], indices: list[int]) -> tuple[Optimizer, Any]:
        groups = [{"params": p, "lr": lrs[i]} for p, i in zip(parameters, indices, strict=True)]
        optimizer = SGD(groups, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer, lambda entries: [entries[i] for i in indices])

    inject(model, LoRA(r=2, target_modules=["abc"[i] for i in kept]))
    ours, our_schedule = make([list(layer.parameters()) for layer in model.values()], [0, 1, 2])
    restrict_to_trainable([ours], [our_schedule], model)
    judge, judges_schedule = make([[nn.Parameter(torch.zeros(1))] for _ in kept], kept)

    def values(optimizer: Optimizer) -> list[tuple[float, float]]:
        return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]

    assert values(ours) == values(judge)
    for step in range(7):
        for optimizer, schedule in ((ours, our_schedule), (judge, judges_schedule)):
            optimizer.step()
            schedule.step(*([1.0 + step] if name == "plateau" else []))
        assert values(ours) == values(judge), step
        assert our_schedule.get_last_lr() == judges_schedule.get_last_lr()
    # Nothing in the state tells of the dropped groups, so it can be saved and loaded.
    our_schedule.load_state_dict(our_schedule.state_dict())


def test_other_optimizers_schedulers_are_untouched() -> None:
    model = three_layers()
    inject(model, LoRA(r=2, target_modules=["a", "c"]))
    first = SGD([{"params": model["a"].parameters()}, {"params": model["b"].parameters()}], lr=0.1)
    second = SGD([{"params": [p]} for p in model["c"].parameters() if p.requires_grad], lr=0.1)
    schedule = schedulers.StepLR(second, 1)
    restrict_to_trainable([first, second], [schedulers.StepLR(first, 1), schedule], model)
    assert len(first.param_groups) == 1
    assert len(second.param_groups) == len(schedule.base_lrs) == 2


def adapted(*names: str, ratio: float = 1) -> tuple[nn.Module, Optimizer]:
    model = three_layers()
    inject(model, LoRA(r=2, target_modules=list(names), loraplus_lr_ratio=ratio))
    return model, SGD(
        [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model.values(), (1, 2, 3), strict=True)]
    )


def test_no_group_goes_from_under_a_scheduler_that_is_not_known() -> None:
    model, optimizer = adapted("b", "c")
    schedule = Halving(optimizer)
    restrict_to_trainable([optimizer], [schedule], model)
    optimizer.step()
    schedule.step()
    assert [(g["lr"], names_in(g, model)) for g in optimizer.param_groups] == [
        (0.5, []),
        (1.0, adapters_of("b")),
        (1.5, adapters_of("c")),
    ]
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    optimizer.load_state_dict(state_by_position(optimizer, saved, model))


class OfTheUsers(schedulers.LRScheduler):
    """Knows its groups by number."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [lr * (number + 1) for number, lr in enumerate(self.base_lrs)]


@pytest.mark.parametrize("make", [OfTheUsers, schedulers.ConstantLR])
@pytest.mark.parametrize("returned", [True, False])
def test_no_group_goes_from_under_one_of_the_users_or_one_that_is_not_returned(make: Any, returned: bool) -> None:
    model, optimizer = adapted("b", "c")
    schedule = make(optimizer)
    restrict_to_trainable([optimizer], [schedule] if returned else [], model)
    known = returned and make is schedulers.ConstantLR
    assert len(optimizer.param_groups) == (2 if known else 3)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[-1]["lr"] == (9 if make is OfTheUsers else 1)


def test_a_ratio_is_refused_where_a_scheduler_would_not_know() -> None:
    model, optimizer = adapted("b", "c", ratio=16)
    with pytest.raises(PEFTError, match=r"Halving sets learning rates too.*leave the ratio out"):
        restrict_to_trainable([optimizer], [Halving(optimizer)], model)
    schedulers.ConstantLR(optimizer)
    with pytest.raises(PEFTError, match=r"a scheduler that configure_optimizers does not return sets"):
        restrict_to_trainable([optimizer], [], model)


def test_a_ratio_reaches_a_scheduler_of_the_users() -> None:
    model, optimizer = adapted("a", "b", "c", ratio=16)
    schedule = OfTheUsers(optimizer)
    restrict_to_trainable([optimizer], [schedule], model)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1, 4, 9, 16 * 4, 2 * 16 * 5, 3 * 16 * 6]


# --- state by name ------------------------------------------------------------------------------------------------


def stepped(reverse: bool = False, steps: int = 1, model: nn.Module | None = None) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = model or three_layers()
    inject(model, LoRA(r=2, target_modules=["a", "c"]), seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters[::-1] if reverse else parameters, lr=0.1)
    for step in range(steps):
        for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.grad = torch.full_like(p, 1.0 + number + step)
        optimizer.step()
    return model, optimizer


def test_state_is_saved_by_name_and_survives_another_order() -> None:
    model, optimizer = stepped()
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert saved["state"].keys() == names.keys() == set(saved["param_groups"][0]["params"])
    other, reversed_optimizer = stepped(reverse=True, steps=0)
    reversed_optimizer.load_state_dict(state_by_position(reversed_optimizer, saved, other))
    for name, p in other.named_parameters():
        if p.requires_grad:
            expected = optimizer.state[names[name]]
            assert torch.equal(reversed_optimizer.state[p]["exp_avg"], expected["exp_avg"])
            assert torch.equal(reversed_optimizer.state[p]["exp_avg_sq"], expected["exp_avg_sq"])
            assert reversed_optimizer.state[p]["step"] == expected["step"]


def test_a_parameter_without_state_has_an_empty_one() -> None:
    model, optimizer = stepped(steps=0)
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    assert saved["state"] == {name: {} for name, p in model.named_parameters() if p.requires_grad}
    assert state_by_position(optimizer, saved, model)["state"] == {}


def test_state_that_does_not_fit_is_refused() -> None:
    model, optimizer = stepped()
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    empty = {**saved, "state": {}}
    with pytest.raises(PEFTError, match=r"no AdamW state for .*zero moments"):
        state_by_position(optimizer, empty, model)
    group = saved["param_groups"][0]
    fewer = {**saved, "param_groups": [{**group, "params": group["params"][1:]}]}
    with pytest.raises(PEFTError, match=r"\['a\.peft\.default\.lora_A'\] are new"):
        state_by_position(optimizer, fewer, model)
    more = {**saved, "param_groups": [{**group, "params": [*group["params"], "d.lora_A"]}]}
    with pytest.raises(PEFTError, match=r"\['d\.lora_A'\] are gone"):
        state_by_position(optimizer, more, model)
    with pytest.raises(PEFTError, match=r"2 param groups.*made 1"):
        state_by_position(optimizer, {**saved, "param_groups": [group, group]}, model)


def test_state_with_one_parameters_moments_missing_is_refused() -> None:
    model, optimizer = stepped()
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    partial = {**saved, "state": {name: s for name, s in saved["state"].items() if name != "c.peft.default.lora_A"}}
    with pytest.raises(PEFTError, match=r"c\.peft\.default\.lora_A"):
        state_by_position(optimizer, partial, model)


@pytest.mark.parametrize("graded", [0, 1])
def test_parameters_that_never_got_a_gradient_have_no_state_and_need_none(graded: int) -> None:
    model, optimizer = stepped(steps=0)
    for p in [p for p in model.parameters() if p.requires_grad][:graded]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    other, fresh = stepped(steps=0)
    fresh.load_state_dict(state_by_position(fresh, saved, other))
    assert len(fresh.state) == graded


def test_an_optimizer_without_state_needs_none() -> None:
    model, _ = stepped(steps=0)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    saved = state_by_name(optimizer, optimizer.state_dict(), model)
    optimizer.load_state_dict(state_by_position(optimizer, saved, model))


class Together(SGD):
    """Counts its steps once for all parameters, under a name, and steps ever less."""

    def step(self, closure: Any = None) -> Any:
        self.state["all"]["steps"] = steps = self.state["all"].get("steps", 0) + 1  # type: ignore[index]
        for group in self.param_groups:
            group["lr"] = 0.1 / steps
        return super().step(closure)


@pytest.mark.parametrize("method", [LoRA(r=2), FullFinetuning()], ids=["adapter", "everything"])
def test_state_under_a_key_of_the_optimizers_own_is_resumed(tmp_path: Path, method: Any) -> None:
    class Stepped(SteppedRegression):
        def configure_optimizers(self) -> Any:
            return Together(self.parameters(), lr=0.1)

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[nn.Module, Any]:
        module = Stepped()
        fit = trainer(tmp_path, PEFTStrategy(method, merge_on_train_end=False), max_epochs=epochs)
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return module, fit

    whole, half = run(4), run(2)
    half[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed = run(4, tmp_path / "half.ckpt")
    states = [fit.optimizers[0].state["all"]["steps"] for _, fit in (half, resumed, whole)]
    assert states == [whole[1].global_step // 2, whole[1].global_step, whole[1].global_step]
    assert_same(resumed[0].state_dict(), whole[0].state_dict())


def test_a_state_of_another_form_is_kept_as_it_is() -> None:
    """Such as that of an optimizer that wraps another."""
    model, optimizer = stepped(steps=0)
    state = {"wrapped": optimizer.state_dict(), "slow": [torch.ones(2)]}
    assert state_by_position(optimizer, state_by_name(optimizer, state, model), model) == state


def test_a_ratio_that_something_overrides_is_told(tmp_path: Path) -> None:
    class Warm(Regression):
        """Warms up by hand, as Lightning's documentation has it."""

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            optimizer.step(closure=closure)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (self.global_step + 1) / 10)

    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2, loraplus_lr_ratio=16)), max_epochs=3)
    with pytest.warns(UserWarning, match="something sets one rate for all param groups") as told:
        run.fit(Warm(), loader())
    assert len([warning for warning in told if "one rate for all" in str(warning.message)]) == 1
