from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Regression, adapter_state, assert_same, loader, trainer
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_peft import LoRA, PEFTError, PEFTStrategy, inject
from lightning_peft.strategy.optim import restrict_to_trainable, state_by_name, state_by_position

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
    with pytest.raises(PEFTError, match=r"SGD.*left with nothing to train.*net\.2\.bias.*self\.parameters\(\)"):
        trainer(tmp_path, strategy).fit(module, loader())


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
