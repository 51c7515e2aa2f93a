"""What a run leaves behind, above all a plain module: `merge_on_train_end="unload"`."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, outputs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from modules import Llama, Regression, adapter_state, assert_same, by_hand, inputs, loader, trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_peft import (
    BitFit,
    FullFinetuning,
    LayerNormTuning,
    LoRA,
    NewTokens,
    PEFTError,
    PEFTStrategy,
    SeriesAdapter,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

KEYS = list(Regression().state_dict())


def unloading(method: Any = None, **options: Any) -> PEFTStrategy:
    return PEFTStrategy(method or LoRA(r=2), merge_on_train_end="unload", **options)


def fit(root: Path, module: Any = None, ckpt_path: Any = None, epochs: int = 1, **options: Any) -> tuple[Any, Any]:
    """Train, with a checkpoint of every epoch."""
    module = module or Regression()
    saver = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    run = trainer(root, unloading(**options), max_epochs=epochs, callbacks=[saver])
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module, run


def marks(module: nn.Module) -> dict[str, tuple[str, list[str]]]:
    """Every module's class, and what it has of its own that counts: attributes and hooks."""
    return {
        name: (type(part).__name__, [key for key, value in vars(part).items() if value or "hook" not in key])
        for name, part in module.named_modules()
    }


def test_nothing_is_left_on_the_module(tmp_path: Path) -> None:
    class Own(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].bias.requires_grad_(False)

    module, stock = Own(), Own()
    saver = ModelCheckpoint(tmp_path, filename="x")
    trainer(tmp_path, unloading(), callbacks=[saver]).fit(module, loader())
    trainer(tmp_path, "auto", callbacks=[ModelCheckpoint(tmp_path)]).fit(stock, loader())
    assert marks(module) == marks(stock)
    assert list(module.state_dict()) == KEYS
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in Own().parameters()]
    trained = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    torch.testing.assert_close(module(inputs()), by_hand(trained, inputs()), rtol=1e-5, atol=1e-5)
    fresh = Regression()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(inputs()), module(inputs()))


EXPORTS: dict[str, Callable[[Regression], Any]] = {
    "TorchScript": lambda module: torch.jit.script(module.net),
    "torch.export": lambda module: torch.export.export(module.net, (inputs(),)).module(),
    "pickle": lambda module: pickle.loads(pickle.dumps(module.net)),
}


def test_code_that_knows_nothing_of_adapters_takes_it(tmp_path: Path) -> None:
    module, _ = fit(tmp_path)
    expected = module(inputs())
    for export in EXPORTS.values():
        torch.testing.assert_close(export(module)(inputs()), expected, rtol=1e-6, atol=1e-6)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module.net), {nn.Linear})
    assert (quantised(inputs()) - expected).abs().max() < 0.1 * expected.abs().max()


def test_save_pretrained_writes_a_plain_model(tmp_path: Path) -> None:
    module = Llama()
    keys = list(module.model.state_dict())
    trainer(tmp_path, unloading()).fit(module, loader())
    module.model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert list(loaded.state_dict()) == keys
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, module.model.eval()(ids).logits)


# --- checkpoints of such a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_load_from_checkpoint_gives_a_plain_module(tmp_path: Path, kind: Any, checkpoint: Any) -> None:
    module, saver = Regression(), kind(tmp_path, filename="one")
    trainer(tmp_path, unloading(checkpoint=checkpoint), callbacks=[saver]).fit(module, loader())
    loaded = Regression.load_from_checkpoint(saver.best_model_path)
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))
    assert marks(loaded).keys() == marks(Regression()).keys()


METHODS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "LoRA": lambda: (LoRA(r=2), {}),
    "VeRA": lambda: (VeRA(r=2), {}),
    "LoRA and a head": lambda: (LoRA(r=2, target_modules="net.0"), {"train_also": "net.2"}),
    "full fine-tuning": lambda: (FullFinetuning(), {}),
    "biases": lambda: (BitFit(), {}),
    "two methods": lambda: ([LoRA(r=2, target_modules="net.0"), BitFit(target_modules="net.2")], {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_full_checkpoint_is_a_plain_modules(tmp_path: Path, name: str) -> None:
    """GluonTS loads the best one by `load_state_dict`, after fit and into the same module."""
    method, options = METHODS[name]()
    module, run = fit(tmp_path, method=method, checkpoint="full", epochs=2, **options)
    last, first = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"] for epoch in (1, 0))
    assert_same(last, dict(module.state_dict()))
    assert not torch.equal(first["net.2.bias" if "biases" in name else "net.0.weight"], Regression().net[0].weight)
    module.load_state_dict(first)
    fresh = Regression()
    fresh.load_state_dict(first)
    assert torch.equal(fresh(inputs()), module(inputs()))
    # For Lightning without this package, which does not look at the key that it adds.
    run.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    torch.testing.assert_close(module(inputs()), fresh(inputs()), rtol=1e-6, atol=1e-6)
    assert list(module.state_dict()) == KEYS


@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, name: str, checkpoint: Any) -> None:
    method, options = METHODS[name]()
    straight, _ = fit(tmp_path, method=method, checkpoint=checkpoint, epochs=2, **options)
    resumed, _ = fit(tmp_path, None, tmp_path / "epoch=0.ckpt", 2, method=method, checkpoint=checkpoint, **options)
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    # Another strategy goes on from it as well.
    kept = Regression()
    options = {**options, "merge_on_train_end": False}
    run = trainer(tmp_path, PEFTStrategy(method, **options), max_epochs=2)
    run.fit(kept, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    torch.testing.assert_close(kept(inputs()), straight(inputs()), rtol=1e-5, atol=1e-5)


class Twice(Regression):
    """Has a layer in two places."""

    def build(self) -> nn.Module:
        inner = nn.Linear(8, 8)
        return nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(8, 4))


def test_a_layer_in_two_places(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path, Twice(), checkpoint="full", epochs=2)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, dict(straight.state_dict()))
    resumed, _ = fit(tmp_path, Twice(), tmp_path / "epoch=0.ckpt", 2, checkpoint="full")
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_a_layer_in_two_places_saved_after_a_merge(tmp_path: Path) -> None:
    module, run = Twice(), trainer(tmp_path, PEFTStrategy(LoRA(r=2), checkpoint="full"))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    loaded = Twice.load_from_checkpoint(tmp_path / "after.ckpt")
    torch.testing.assert_close(loaded(inputs()), module(inputs()), rtol=1e-5, atol=1e-5)


def test_what_adapts_a_tied_weight_as_a_whole_is_merged_once(tmp_path: Path) -> None:
    class Tied(Llama):
        def __init__(self) -> None:
            super().__init__()
            self.model.config.tie_word_embeddings = True
            self.model.tie_weights()

    module = Tied()
    saver = ModelCheckpoint(tmp_path, filename="x")
    method = NewTokens(token_indices=[3, 5])
    trainer(tmp_path, unloading(method, checkpoint="full"), callbacks=[saver]).fit(module, loader())
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, dict(module.state_dict()))
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert not torch.equal(saved["model.lm_head.weight"], Tied().model.lm_head.weight)


# --- after such a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["test", "validate", "predict"])
def test_an_evaluation_leaves_it_plain(tmp_path: Path, what: str) -> None:
    module, run = fit(tmp_path)
    before = copy.deepcopy(module.state_dict())
    for trainer_ in (run, trainer(tmp_path, unloading()), trainer(tmp_path)):
        getattr(trainer_, what)(module, loader(), **({} if what == "predict" else {"verbose": False}))
        assert_same(dict(module.state_dict()), dict(before))


def test_an_adapter_of_a_base_that_is_gone_is_refused(tmp_path: Path) -> None:
    """However small what it learnt: it would be counted twice."""

    class Slow(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    module, run = fit(tmp_path, Slow())
    before = copy.deepcopy(module.state_dict())
    path = tmp_path / "epoch=0.ckpt"
    for call in (
        lambda: run.test(module, loader(), ckpt_path=path, verbose=False),
        lambda: run.test(module, loader(), ckpt_path="best", verbose=False),
        lambda: trainer(tmp_path, max_epochs=2).fit(module, loader(), ckpt_path=path),
    ):
        with pytest.raises(PEFTError, match="merged into them for good, so the base is gone"):
            call()
        assert_same(dict(module.state_dict()), dict(before))
    # Once the base is back, it fits.
    module.load_state_dict(Slow().state_dict())
    run.test(module, loader(), ckpt_path=path, verbose=False)
    assert_same(dict(module.state_dict()), dict(before))


class Holder(Regression):
    """Is given its network, as modules of packages are that train one network several times."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_a_network_that_another_module_takes_over(tmp_path: Path) -> None:
    net, x = Regression().net, inputs()
    fit(tmp_path, Holder(net))
    trained, path = net(x), tmp_path / "epoch=0.ckpt"
    with pytest.raises(PEFTError, match="merged into them for good, so the base is gone"):
        Holder.load_from_checkpoint(path, net=net)
    torch.testing.assert_close(Holder.load_from_checkpoint(path, net=Regression().net)(x), trained)
    fit(tmp_path / "again", Holder(net))
    assert not torch.equal(net(x), trained)


@pytest.mark.parametrize("told", ["merge", "unload"])
def test_what_the_refusal_of_a_shared_network_says_works(tmp_path: Path, told: str) -> None:
    net, path = Regression().net, tmp_path / "epoch=0.ckpt"
    first = Holder(net)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}")
    trainer(tmp_path, PEFTStrategy(LoRA(r=2)), callbacks=[saver]).fit(first, loader())
    trained = net(inputs())
    with pytest.raises(PEFTError, match=r"merge\(module, unload=True\), or in a run with merge_on_train_end='unload'"):
        trainer(tmp_path).fit(Holder(net), loader())
    if told == "merge":
        merge(first, unload=True)
    else:
        net = Regression().net
        fit(tmp_path / "unloaded", Holder(net))
    torch.testing.assert_close(net(inputs()), trained)
    trainer(tmp_path).fit(Holder(net), loader())
    torch.testing.assert_close(Holder.load_from_checkpoint(path, net=Regression().net)(inputs()), trained)


def test_so_is_an_adapter_in_a_directory(tmp_path: Path) -> None:
    model = Regression().net
    inject(model, LoRA(r=2))
    model[0].peft.default.lora_B.data.add_(1e-4)
    save_adapter(model, tmp_path / "a")
    merge(model, unload=True)
    with pytest.raises(PEFTError, match="merged into them for good"):
        load_adapter(model, tmp_path / "a")
    load_adapter(Regression().net, tmp_path / "a")


def test_a_second_fit_trains_new_adapters_on_the_merged_weights(tmp_path: Path) -> None:
    module, _ = fit(tmp_path)
    once = copy.deepcopy(module)
    fit(tmp_path, module)
    fit(tmp_path, once)
    assert_same(dict(module.state_dict()), dict(once.state_dict()))
    assert list(module.state_dict()) == KEYS
    assert module.loss(inputs()) < fit(tmp_path)[0].loss(inputs())


def test_the_tuner_before_and_after(tmp_path: Path) -> None:
    module = Regression()
    module.lr = 0.05
    run = trainer(tmp_path, unloading(), max_epochs=1)
    options: dict[str, Any] = {"num_training": 4, "early_stop_threshold": None, "update_attr": False}
    Tuner(run).lr_find(module, loader(), **options)
    assert adapter_state(module)
    run.fit(module, loader())
    assert_same(dict(module.state_dict()), dict(fit(tmp_path)[0].state_dict()))
    before = module(inputs())
    again = trainer(tmp_path, unloading(), max_epochs=1)
    Tuner(again).lr_find(module, loader(), **options)
    assert torch.equal(module(inputs()), before)
    again.fit(module, loader())
    assert list(module.state_dict()) == KEYS


def test_a_checkpoint_of_the_plain_module_is_lightnings(tmp_path: Path) -> None:
    module, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert_same(saved["state_dict"], dict(module.state_dict()))
    assert "lightning_peft" not in saved
    assert torch.equal(Regression.load_from_checkpoint(tmp_path / "after.ckpt")(inputs()), module(inputs()))
    with pytest.raises(PEFTError, match=r"directory was asked for.*for good.*during the run"):
        run.save_checkpoint(tmp_path / "after", storage_options=AdapterDirectory())
    with pytest.raises(PEFTError, match="not written by PEFTStrategy"):
        fit(tmp_path, None, tmp_path / "after.ckpt", 2)


def test_base_weights_are_not_loaded_over_it_again(tmp_path: Path) -> None:
    model, ids = build("llama")
    model.save_pretrained(tmp_path / "base")

    class Loaded(Llama):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama")[0]

    module = Loaded()
    run = trainer(tmp_path, unloading(base_weights=str(tmp_path / "base")))
    run.fit(module, loader())
    trained = outputs(module.model, ids)
    assert not torch.equal(trained, outputs(model, ids))
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run.test(module, loader(), verbose=False)
    assert torch.equal(outputs(module.model, ids), trained)
    seen: list[Tensor] = []
    module.on_train_start = lambda: seen.append(outputs(module.model, ids))  # type: ignore[method-assign]
    trainer(tmp_path, unloading(base_weights=str(tmp_path / "base"))).fit(module, loader())
    assert torch.equal(seen[0], trained)


def test_a_run_that_does_not_end_keeps_its_adapters(tmp_path: Path) -> None:
    class Breaking(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("fault")
            return super().training_step(batch, batch_idx)

    module = Breaking()
    with pytest.raises(RuntimeError, match="fault"):
        fit(tmp_path, module)
    assert adapter_state(module)
    module = Regression()
    trainer(tmp_path, unloading(), fast_dev_run=True).fit(module, loader(), loader())
    assert adapter_state(module)


# --- what is refused, before training -----------------------------------------------------------------------------


class TiedLayers(Regression):
    def build(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        net[1].weight = net[0].weight
        return net


class Biasless(Regression):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4, bias=False))


@pytest.mark.parametrize(
    ("module", "method", "message"),
    [
        (Regression, SeriesAdapter(target_modules=["net.0"], bottleneck=2), r"merged into a weight of 'net\.0'"),
        (Biasless, BitFit(create_missing=True), r"gives 'net\.0' a bias"),
        (TiedLayers, LoRA(r=2, target_modules="net.0"), r"'net\.0' shares its weight"),
    ],
)
def test_what_would_not_be_plain(tmp_path: Path, module: Any, method: Any, message: str) -> None:
    with pytest.raises(PEFTError, match=rf"merge_on_train_end='unload' was given.*{message}.*leave out 'unload'"):
        trainer(tmp_path, unloading(method)).fit(module(), loader())


def test_methods_without_adapters_leave_a_plain_module(tmp_path: Path) -> None:
    class Norms(Regression):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    module = Norms()
    trainer(tmp_path, unloading(LayerNormTuning())).fit(module, loader())
    assert marks(module).keys() == marks(Norms()).keys()
    assert not torch.equal(module.net[1].weight, Norms().net[1].weight)


@pytest.mark.parametrize("value", ["Unload", None, 2])
def test_an_unknown_value(value: Any) -> None:
    with pytest.raises(PEFTError, match=rf"merge_on_train_end={value!r} was given; it is True, False or 'unload'"):
        PEFTStrategy(merge_on_train_end=value)
