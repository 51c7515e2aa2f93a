"""What a method may do besides: run before its host, share modules, ask for learning rates, follow a schedule."""

import copy
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from families import build, outputs, randomise
from modules import Regression, SteppedRegression, adapter_state, assert_same, loader, trainer
from resuming import straight_and_resumed
from strangers import unsealed
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_peft import (
    IA3,
    BitFit,
    FullFinetuning,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    SeriesAdapter,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import with_input
from lightning_peft.strategy.optimizers.optim import restrict_to_trainable
from lightning_peft.targets.select import select
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.weights import features, is_linear

CALLS: list[tuple[int, int | None, list[str]]] = []


class Common(nn.Module):
    """A matrix that is trained, and one that is drawn once and stays."""

    def __init__(self, r: int, seed: int) -> None:
        super().__init__()
        self.slow = nn.Parameter(torch.eye(r))
        self.register_buffer("frozen", torch.empty(r, r))
        fill(self.frozen, seed, "frozen", lambda values, generator: nn.init.normal_(values, generator=generator))


class SharedAdapter(Adapter):
    def __init__(self, host: nn.Module, common: Common) -> None:
        super().__init__()
        d_in, d_out = features(host)
        self.common = common
        self.fast = nn.Parameter(torch.zeros(d_out, common.slow.shape[0]))
        self.register_buffer("fixed", torch.ones(common.slow.shape[0], d_in), persistent=False)

    def before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_input(args, kwargs, args[0] * 1.0)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output + args[0] @ self.fixed.T @ self.common.frozen @ self.common.slow @ self.fast.T


@dataclass(frozen=True, kw_only=True)
class Everything(PEFTMethod):
    """A method that does all that a method may do."""

    name: ClassVar[str] = "everything"
    needs_total_steps: ClassVar[bool] = True

    r: int = 2

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        return select(model, "all-linear", adaptable=is_linear)

    def adapters(self, model: nn.Module, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        common = Common(self.r, seed)
        return {name: SharedAdapter(host, common) for name, host in hosts.items()}

    def lr_ratio(self, parameter: str) -> float:
        return 16.0 if parameter == "fast" else 1.0

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int | None) -> None:
        with_gradient = [host for host, a in adapters.items() if all(p.grad is not None for p in a.parameters())]
        CALLS.append((step, total_steps, with_gradient))


def test_a_shared_module_is_one() -> None:
    model, inputs = build("sequential")
    inject(model, Everything())
    names = {"0.peft.default.fast", "2.peft.default.fast", "0.peft.default.common.slow", "0.peft.default.common.frozen"}
    assert adapter_state_dict(model).keys() == names
    randomise(model)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        first, second = (twin[i].peft["default"].common for i in (0, 2))
        assert first is second
        assert first is not model[0].peft["default"].common
        assert torch.equal(outputs(twin, inputs), expected)
        assert adapter_state_dict(twin).keys() == names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == names - {"0.peft.default.common.frozen"}


def test_a_shared_module_is_saved_once(tmp_path: Path) -> None:
    model, inputs = build("sequential")
    inject(model, Everything(), seed=1)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(5)
    fresh, _ = build("sequential")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    eject(fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(*build("sequential")))


def test_before_runs_only_while_its_adapter_does() -> None:
    model, inputs = build("llama")
    expected = outputs(model, inputs)
    inject(model, IA3(), name="a")
    inject(model, LoRA(r=2, target_modules=["down_proj"]), name="b")
    randomise(model)
    with_a = outputs(model, inputs)
    assert not torch.equal(with_a, expected)
    model.get_submodule("model.layers.0.mlp.down_proj").peft.activate("b")
    assert not torch.equal(outputs(model, inputs), with_a)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 2  # the down projections
    eject(model)
    assert torch.equal(outputs(model, inputs), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.fixture
def calls() -> list[Any]:
    CALLS.clear()
    return CALLS


def test_the_schedule_is_called_after_each_step(tmp_path: Path, calls: list[Any]) -> None:
    run = trainer(tmp_path, PEFTStrategy(Everything()), max_steps=2, accumulate_grad_batches=2)
    run.fit(Regression(), loader())
    assert calls == [(1, 2, ["net.0", "net.2"]), (2, 2, ["net.0", "net.2"])]


def test_the_schedule_goes_on_after_a_resume(tmp_path: Path, calls: list[Any]) -> None:
    callback = AdapterCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, PEFTStrategy(Everything()), max_steps=2, callbacks=[callback]).fit(Regression(), loader())
    run = trainer(tmp_path, PEFTStrategy(Everything()), max_steps=3)
    run.fit(Regression(), loader(), ckpt_path=tmp_path / "last")
    assert [step for step, _, _ in calls] == [1, 2, 3]


def test_a_schedule_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"Everything divides.*Set max_steps"):
        trainer(tmp_path, PEFTStrategy(Everything()), max_epochs=-1).fit(Regression(), loader())


@dataclass(frozen=True, kw_only=True)
class Plus(LoRA):
    """LoRA+ (Hayou et al., 2024): B learns faster than A."""

    name: ClassVar[str] = "plus"

    def lr_ratio(self, parameter: str) -> float:
        return {"lora_A": 0.5, "lora_B": 8.0}[parameter]


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 8)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers_keep_the_ratio(case: str) -> None:
    def rates(method: PEFTMethod) -> list[list[float]]:
        model = Regression()
        inject(model, method)
        optimizer = torch.optim.SGD(
            [{"params": model.net[0].parameters()}, {"params": model.net[2].parameters(), "lr": 0.3}],
            lr=0.1,
            momentum=0.9,
        )
        scheduler = SCHEDULERS[case](optimizer)
        restrict_to_trainable([optimizer], [scheduler], model)
        found = []
        for _ in range(7):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step(*([1.0] if case == "plateau" else []))
        return found

    for plain, plus in zip(rates(LoRA(r=2)), rates(Plus(r=2)), strict=True):
        assert plus == pytest.approx([*(0.5 * lr for lr in plain), *(8 * lr for lr in plain)])


def test_the_ratio_trains_as_groups_made_by_hand(tmp_path: Path) -> None:
    module = SteppedRegression()
    trainer(tmp_path, PEFTStrategy(Plus(r=2), merge_on_train_end=False), max_steps=3).fit(module, loader())

    class ByHand(SteppedRegression):
        def configure_optimizers(self) -> Any:
            named = list(self.named_parameters())
            groups = [
                {"params": [p for n, p in named if "lora_A" in n], "lr": 0.025},
                {"params": [p for n, p in named if "lora_B" in n], "lr": 0.4},
            ]
            optimizer = torch.optim.AdamW(groups)
            schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    judge = ByHand()
    trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end=False), max_steps=3).fit(judge, loader())
    for name, tensor in adapter_state(judge).items():
        assert torch.allclose(adapter_state(module)[name], tensor, atol=1e-6), name


def test_split_groups_resume(tmp_path: Path) -> None:
    straight, resumed = straight_and_resumed(tmp_path, SteppedRegression, Plus(r=2))
    assert_same(adapter_state(straight), adapter_state(resumed))


def test_lbfgs_has_one_learning_rate() -> None:
    model = Regression()
    inject(model, Plus(r=2))
    with pytest.raises(PEFTError, match="LBFGS has one learning rate"):
        restrict_to_trainable([torch.optim.LBFGS(model.parameters())], [], model)


LISTS: dict[str, list[PEFTMethod]] = {
    "adapters": [LoRA(r=2, target_modules="attention"), ParallelAdapter(bottleneck=3)],
    "selection": [LoRA(r=2, target_modules=["c_attn"]), BitFit()],
    "folded bias": [IA3(), BitFit()],
    "two selections": [LayerNormTuning(), BitFit()],
    "norms twice": [SeriesAdapter(bottleneck=3), LayerNormTuning()],
    "same twice": [LoRA(r=2, target_modules=["c_attn"]), LoRA(r=3, target_modules=["c_fc"])],
}


@pytest.mark.parametrize("case", LISTS)
def test_several_methods_at_once(case: str, tmp_path: Path) -> None:
    model, inputs = build("gpt2")
    base = outputs(model, inputs)
    inject(model, LISTS[case])
    randomise(model)
    expected, state = outputs(model, inputs), {k: v.clone() for k, v in adapter_state_dict(model).items()}
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    if case == "selection":  # for which HF PEFT has a key
        assert (config["peft_type"], config["bias"]) == ("LORA", "all")
    else:
        assert [method["method"] for method in config["methods"]] == [method.name for method in LISTS[case]]
    fresh, _ = build("gpt2")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), expected)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), expected)
    merge(model)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    assert_same(dict(adapter_state_dict(model)), state)
    unmerge(model)
    assert torch.equal(outputs(model, inputs), expected)
    eject(model)
    assert torch.equal(outputs(model, inputs), base)


def test_one_module_takes_one_adapter() -> None:
    model, _ = build("llama")
    keys = list(model.state_dict())
    with pytest.raises(
        PEFTError, match=r"LoRA and ParallelAdapter would both adapt 'model\.layers\.0\.mlp\.gate_proj'"
    ):
        inject(model, [LoRA(r=2), ParallelAdapter(bottleneck=3)])
    assert list(model.state_dict()) == keys


def test_a_list_on_the_strategy(tmp_path: Path) -> None:
    methods = [LoRA(r=2), BitFit()]
    callback = AdapterCheckpoint(dirpath=tmp_path, save_last=True)
    module = Regression()
    trainer(tmp_path, PEFTStrategy(methods), callbacks=[callback]).fit(module, loader())
    expected = module(torch.ones(2, 8))
    for loaded in (Regression.load_from_checkpoint(tmp_path / "last"), Regression()):
        if not any(".peft." in key for key in loaded.state_dict()):
            load_adapter(loaded, tmp_path / "last")
        assert torch.allclose(loaded(torch.ones(2, 8)), expected, atol=1e-6)
    with pytest.raises(PEFTError, match=r"method 'lora \+ bitfit'; this model has 'lora'"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(Regression(), loader(), ckpt_path=tmp_path / "last")


def test_what_is_trained_itself_goes_with_one_adapter() -> None:
    model, _ = build("gpt2")
    inject(model, LoRA(r=2))
    with pytest.raises(PEFTError, match="BitFit trains parameters of the model itself"):
        inject(model, BitFit(), name="second")
    model, _ = build("gpt2")
    inject(model, BitFit())
    with pytest.raises(PEFTError, match="belongs to one adapter"):
        inject(model, LoRA(r=2), name="second")


def test_hf_peft_refuses_our_own_format(tmp_path: Path) -> None:
    model, _ = build("llama")
    inject(model, ParallelAdapter(bottleneck=3))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError), match="LIGHTNING_PEFT"):
        peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "adapter")


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no methods": ({"methods": []}, "a list of objects was expected"),
    "unknown": ({"methods": [{"method": "x"}]}, "Unknown method 'x'"),
    "unknown key": ({"methods": [{"method": "parallel_adapter", "x": 1}]}, "does not fit"),
    "other width": ({"methods": [{"method": "parallel_adapter", "bottleneck": 4}]}, "has shape"),
    "other place": ({"methods": [ParallelAdapter(bottleneck=3, placement=["attention"]).config()]}, "Missing"),
    "train_also": ({"train_also": "lm_head"}, r"list\[str\] was expected"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_of_our_own_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGE[case]
    model, _ = build("llama")
    inject(model, ParallelAdapter(bottleneck=3))
    save_adapter(model, tmp_path / "adapter")
    file = unsealed(tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    fresh, _ = build("llama")
    keys = list(fresh.state_dict())
    with pytest.raises(PEFTError, match=message):
        load_adapter(fresh, tmp_path / "adapter")
    assert list(fresh.state_dict()) == keys


def test_another_method_under_the_name_is_refused(tmp_path: Path) -> None:
    model, _ = build("llama")
    inject(model, ParallelAdapter(bottleneck=3))
    save_adapter(model, tmp_path / "adapter")
    fresh, _ = build("llama")
    inject(fresh, LoRA(r=2))
    with pytest.raises(PEFTError, match="written with method 'parallel_adapter'; this model has 'lora'"):
        load_adapter(fresh, tmp_path / "adapter")


def test_added_biases_merge_and_go_again() -> None:
    model, inputs = build("llama")
    inject(model, BitFit(create_missing=True))
    assert model.get_submodule("lm_head").bias is None
    randomise(model)
    expected, layer = outputs(model, inputs), model.get_submodule("model.layers.0.mlp.up_proj")
    merge(model)
    assert torch.equal(layer.bias, layer.peft["default"].bias)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    unmerge(model)
    assert layer.bias is None
    assert torch.equal(outputs(model, inputs), expected)


def test_a_full_checkpoint_has_no_merged_biases(tmp_path: Path) -> None:
    class NoBias(Regression):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))

    module, path = NoBias(), tmp_path / "full.ckpt"
    run = trainer(tmp_path, PEFTStrategy(BitFit(create_missing=True), checkpoint="full"))
    run.fit(module, loader())
    assert module.net[0].bias is not None
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state.keys() == {f"net.{i}.{name}" for i in (0, 2) for name in ("weight", "peft.default.bias")}


class Normed(SteppedRegression):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))


def test_running_statistics_are_kept_with_what_moves_them(tmp_path: Path) -> None:
    straight, resumed = straight_and_resumed(tmp_path, Normed, FullFinetuning())
    assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))
    assert straight.net[1].running_mean.abs().max() > 0
    fresh = Normed()
    load_adapter(fresh, tmp_path / "straight" / "last")
    assert_same(dict(fresh.state_dict()), dict(straight.state_dict()))
    eject(straight)
    assert_same(dict(straight.state_dict()), dict(Normed().state_dict()))


def test_errors_of_selections() -> None:
    with pytest.raises(PEFTError, match=r"no biases in target_modules='q_proj'.*create_missing=True"):
        inject(build("llama")[0], BitFit(target_modules="q_proj"))
    with pytest.raises(PEFTError, match="target_modules: 'nrm' matches no module"):
        inject(build("llama")[0], LayerNormTuning(target_modules="nrm"))
    frozen, _ = build("llama")
    frozen.requires_grad_(False)
    with pytest.warns(UserWarning, match="every parameter of this LlamaForCausalLM is frozen"):
        assert inject(frozen, FullFinetuning()) == []
    with pytest.raises(PEFTError, match="feedforward_modules was given without target_modules"):
        IA3(feedforward_modules=["down_proj"])
    assert inject(build("llama")[0], LayerNormTuning(target_modules=["model.norm"])) == ["model.norm.weight"]
